"""GRPO with TRL's own trainer on a CPU, the other side of ``benchmarks.end_to_end``.

    python -m benchmarks.trl_run --check             # which TRL there is, as JSON
    python -m benchmarks.trl_run JOB.json            # train; one line of JSON for each batch of samples

Any interpreter that has TRL will do; of this project only the reward function is imported. A job holds ``policy``
(folder), ``prompts`` (rows with ``prompt``, its ``ids`` and ``fields``, in the order of training), ``reward``
(module:function), ``config`` (arguments of ``GRPOConfig``) and ``steps``, the file that is written.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO


def main(arguments: list[str]) -> None:
    if arguments == ["--check"]:
        print(json.dumps(check()))
    else:
        train(json.loads(Path(arguments[0]).read_text()))


def check() -> dict[str, Any]:
    """``version`` of TRL, None if it cannot be imported, and then why; ``ppo``: whether it has a trainer for PPO."""
    _hide_vllm()
    try:
        from trl import GRPOTrainer  # noqa: F401
    except (ImportError, RuntimeError) as error:  # TRL wraps what fails inside it in a RuntimeError
        return {"version": None, "ppo": False, "error": str(error)}
    names = ("trl.trainer.ppo_trainer", "trl.experimental.ppo")
    return {"version": metadata.version("trl"), "ppo": any(importlib.util.find_spec(name) for name in names)}


def train(job: dict[str, Any]) -> None:
    """Train on all prompts once.

    Raises:
        ValueError: the tokenizer reads the prompts in another way than the other side does.
    """
    if not job["config"].get("use_vllm"):
        _hide_vllm()
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    for row in job["prompts"]:
        found = tokenizer(row["prompt"])["input_ids"]
        if found != row["ids"]:
            raise ValueError(f"prompt {row['prompt']!r} has the tokens {found} here and {row['ids']} there")
    columns = {key: [row[key] for row in job["prompts"]] for key in ("prompt", "fields")}
    with Path(job["steps"]).open("w") as out:
        trainer = GRPOTrainer(
            model=job["policy"],
            reward_funcs=_reward(job["reward"]),
            args=GRPOConfig(**job["config"]),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            callbacks=[_writer(out)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _hide_vllm() -> None:
    """TRL imports vLLM wherever it finds it, which takes longer than a small run."""
    sys.modules["vllm"] = None  # type: ignore[assignment]  # Python's way to say that there is none


def _reward(name: str) -> Callable[..., list[float]]:
    """The reward function of the other side with the signature that TRL calls."""
    module, _, function = name.partition(":")
    score = getattr(importlib.import_module(module), function)

    def reward(prompts: list[str], completions: list[str], fields: list[dict[str, Any]], **_: Any) -> list[float]:
        return list(score(prompts, completions, fields))

    return reward


def _writer(out: TextIO) -> Any:
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        """Writes what each batch of samples came to; the trainer logs once for each of them."""

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "reward" in logs:  # the last call has figures of the whole run instead
                line = {"time": time.time(), "reward": logs["reward"], "length": logs["completions/mean_length"]}
                out.write(json.dumps(line) + "\n")
                out.flush()

    return Writer()


if __name__ == "__main__":
    main(sys.argv[1:])
