"""A local Ray cluster, runs of the program, and an environment that leaves the user's home alone."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from jobs import REWARDS, SMALL, Job


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray writes a token to ``~/.ray``: for these tests ``~`` is a folder of ours."""
    home = tmp_path_factory.mktemp("home")
    # What DeepSpeed and vLLM compile on first use is kept: it takes the better part of a minute.
    cache = Path.home() / ".cache"
    cache.mkdir(exist_ok=True)
    (home / ".cache").symlink_to(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        # The tests bring their own thread counts; what the shell says must not win over them.
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield home


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray in this process. Four CPUs, whatever the machine has: Ray starts a process for each of them."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def one_engine_at_a_time() -> Iterator[None]:
    """What a test leaves of its vLLM engine goes before the next one comes."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def engines_in_this_process() -> Iterator[None]:
    """vLLM joins torch's default process group in this process; other tests make their own."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def finish(tmp_path_factory: pytest.TempPathFactory, config: str) -> Callable[..., Job]:
    """A run to its end, for all tests of a module."""

    def run(*arguments: str) -> Job:
        place = tmp_path_factory.mktemp("whole")
        (place / "my_rewards.py").write_text(REWARDS)
        job = Job(place, ["--config", config, *arguments]).wait()
        assert job.code == 0, job.output
        return job

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a run; whatever the test does, its processes end with the test."""
    jobs: list[Job] = []

    def begin(*arguments: str, folder: str = "job", program: Sequence[str] = ("rlhf_dist.main",)) -> Job:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)  # the same folder again: a run that goes on
        (place / "my_rewards.py").write_text(REWARDS)
        jobs.append(Job(place, list(arguments), program))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)
            job.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy with the world's tokenizer."""
    from rlhf_dist.data.tokenization import save_tokenizer
    from rlhf_dist.data.world import build_tokenizer
    from rlhf_dist.models import build_policy

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, str(folder))
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    build_policy(SMALL, len(tokenizer), special, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(policy: Path) -> str:
    """GRPO with a Python function: the smallest run with every part but the critic."""
    tree = {
        "recipe": "ppo",
        "model": {"path": str(policy)},
        "data": {"format": "world", "world": {"prompts": 64, "test_prompts": 32}},
        "rollout": {
            "batch_size": 8,
            "n_samples_per_prompt": 4,
            "max_prompt_length": 48,
            "max_response_length": 12,
            "chunk_tokens": 60,
        },
        "algo": {"advantage_estimator": "grpo", "kl_estimator": "k3", "use_kl_loss": True},
        "train": {"steps": 2, "batch_size": 32, "micro_batch_tokens": 400},
        "policy": {"learner": {"cpus": 0.2}, "optim": {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0}},
        "reference": {"cpus": 0.1},
        "reward": {"cpus": 0.1, "components": [{"name": "length", "function": "my_rewards:length"}]},
        "generator": {"cpus": 0.2},
        "evaluation": {"prompts": 8, "greedy": False},
        "cluster": {"local_cpus": 2, "object_store_mb": 100},
        "run": {"wait_limit": 300},
    }
    file = policy / "grpo.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)
