"""What generators are compared with: ``LLM.generate`` in a loop, on the requests that a run would send.

Each loop is a process of its own, which loads, compiles, and then waits for its turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config import Config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class BareLoops:
    """Processes with one engine and one thread each."""

    processes: Sequence[subprocess.Popen[str]]

    def generate(self, groups: Sequence[tuple[int, int]]) -> tuple[int, float]:
        """Tokens of responses, and seconds until the last process is done.

        Args:
            groups: ``(group_id, row of the prompts)``; dealt out in turn before anything is known of their lengths.
        """
        started = time.perf_counter()
        for i, process in enumerate(self.processes):
            assert process.stdin is not None
            print(json.dumps(groups[i :: len(self.processes)]), file=process.stdin, flush=True)
        tokens = sum(_answer(process) for process in self.processes)
        return tokens, time.perf_counter() - started


@contextmanager
def bare_loops(cfg_options: Sequence[str], count: int = 1) -> Iterator[BareLoops]:
    """``count`` loops for the run that ``cfg_options`` would start; they end with the block."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "benchmarks.bare_vllm", *cfg_options]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
                )
            )
            for _ in range(count)
        ]
        for process in processes:
            _answer(process)  # it has compiled
        yield BareLoops(processes)
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()


def _answer(process: subprocess.Popen[str]) -> int:
    """The number in its next line that is one; vLLM prints lines of its own."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit():
            return int(line)
    raise SystemExit(f"the bare vLLM loop ended with exit code {process.wait()}; what it said is above")


def serve(cfg: Config) -> None:
    """For each line of groups on stdin, the number of tokens that were generated, on stdout."""
    from vllm import LLM, SamplingParams

    from rlhf_dist.actors.generator import sample_seed
    from rlhf_dist.data.load import load_prompts
    from rlhf_dist.data.ragged import Ragged
    from rlhf_dist.data.tokenization import load_tokenizer

    assert cfg.model.path is not None
    rollout, eos_id = cfg.rollout, load_tokenizer(cfg.model.path).eos_token_id
    prompts = Ragged.of(load_prompts(cfg, cfg.model.path, "train")[0], "prompt_ids")
    llm = LLM(
        model=cfg.model.path,
        dtype=cfg.model.dtype,
        skip_tokenizer_init=True,
        max_model_len=rollout.max_prompt_length + rollout.max_response_length,
        max_num_seqs=cfg.generator.max_num_seqs,
        kv_cache_memory_bytes=int(cfg.generator.kv_cache_gb * 2**30),
        enable_chunked_prefill=False,
        max_num_batched_tokens=8192,
        logprobs_mode="processed_logprobs",
    )

    def generate(groups: Sequence[tuple[int, int]]) -> int:
        requests, params = [], []
        for group, row in groups:
            for i in range(rollout.n_samples_per_prompt):
                requests.append({"prompt_token_ids": prompts[row].tolist()})
                params.append(
                    SamplingParams(
                        temperature=rollout.temperature,
                        max_tokens=rollout.max_response_length,
                        stop_token_ids=[eos_id],
                        seed=sample_seed(cfg.seed, group, i),
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                )
        outs = llm.generate(requests, params, use_tqdm=False)  # type: ignore[arg-type]
        return sum(len(out.outputs[0].token_ids) for out in outs)

    generate([(-1 - i, 0) for i in range(8)])  # compiles
    print(0, flush=True)
    for line in sys.stdin:
        print(generate(json.loads(line)), flush=True)


if __name__ == "__main__":
    from rlhf_dist.config_io import load

    serve(load(None, sys.argv[1:]))
