"""The reward: real function processes, and every way in which they fail; endpoints are in test_endpoint.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from tiny import rollouts

from rlhf_dist import schema
from rlhf_dist.actors.rewards import load_function
from rlhf_dist.actors.scorer import Scorer
from rlhf_dist.actors.waiting import WorkerFailed, explained, from_task_error
from rlhf_dist.config import ModelConfig, RewardComponent
from rlhf_dist.data.tokenization import save_tokenizer
from rlhf_dist.data.world import build_tokenizer

FUNCTIONS = """
import time

def length(prompts, responses, fields):
    return [float(len(r)) for r in responses]

def field(prompts, responses, fields):
    return [f["answer"] for f in fields]

def raises(prompts, responses, fields):
    raise KeyError("no such family")

def short(prompts, responses, fields):
    return [0.0]

def nan(prompts, responses, fields):
    return [0.0, float("nan"), 1.0]

def words(prompts, responses, fields):
    return ["good"] * len(prompts)

def flags(prompts, responses, fields):
    return [True] * len(prompts)

def huge(prompts, responses, fields):
    return [10**400] * len(prompts)

def beyond_float32(prompts, responses, fields):
    return [0.0, 1e39, 1.0]

def nested(prompts, responses, fields):
    return [[0.0]] * len(prompts)

def nothing(prompts, responses, fields):
    return None

def hangs(prompts, responses, fields):
    if prompts[0] == "p0":
        time.sleep(600)
    return [1.0] * len(prompts)

def dies(prompts, responses, fields):
    import os
    os._exit(3)

value = 3
"""


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(), str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


def prompts(first: int = 0) -> pa.Table:
    rows = range(first, first + 3)
    columns = {
        "prompt_id": list(range(3)),
        "prompt_ids": [[1]] * 3,
        "prompt": [f"p{i}" for i in rows],
        "fields": [json.dumps({"answer": i}) for i in rows],
    }
    return pa.table(columns, schema=schema.PROMPT)


def scorer(tokenizer_dir: str, *components: dict[str, Any]) -> Any:
    """The actor's class without Ray around it: it runs here."""
    parts = [RewardComponent(**{"name": "r", **c}) for c in components]
    return Scorer.__ray_metadata__.modified_class("reward", parts, ModelConfig(path="-"), tokenizer_dir, 1000, 0)


CHUNK = rollouts([(1, 2), (2, 3), (1, 4)])


def test_a_weighted_sum_of_components(tokenizer_dir: str) -> None:
    process = scorer(
        tokenizer_dir,
        {"name": "length", "function": "test_functions:length", "weight": 0.5},
        {"name": "field", "function": "test_functions:field", "weight": -2},
    )
    found = process.score(CHUNK, prompts(), True)[0]
    texts = process.tokenizer.batch_decode(CHUNK["response_ids"].to_pylist(), skip_special_tokens=True)
    assert found["row"].to_pylist() == [0, 1, 2]
    assert found["score/length"].to_pylist() == [len(t) for t in texts]
    assert found["score/field"].to_pylist() == [0, 1, 2]
    assert found["score"].to_pylist() == pytest.approx([0.5 * len(t) - 2 * i for i, t in enumerate(texts)])
    assert process.score(CHUNK, prompts(), False)[0].column_names == ["row", "metric/length", "metric/field"]


def test_prompts_are_those_of_the_rows(tokenizer_dir: str) -> None:
    process = scorer(tokenizer_dir, {"function": "test_functions:field"})
    found = process.score(CHUNK.take(pa.array([2, 0])), prompts(), True)[0]
    assert found["score"].to_pylist() == [2, 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "reward 'r': test_functions:raises raised KeyError: 'no such family'"),
        ("short", "reward 'r' returned 1 scores for 3 samples"),
        ("nan", "reward 'r' returned nan for sample 1; expected a finite number. Prompt 'p1', response '"),
        ("nan", "(prompt_id 1, group_id 1, sample_index 0)"),
        ("short", "for 3 samples: prompt_id 0, group_id 0, sample_index 0; prompt_id 1, group_id 1, sample_index 0; "),
        ("beyond_float32", "reward 'r' returned 1e+39 for sample 1; expected a finite number"),
        ("nested", "reward 'r' returned [0.0] for sample 0; expected a finite number"),
        ("words", "reward 'r' returned 'good' for sample 0; expected a finite number"),
        ("flags", "reward 'r' returned True for sample 0; expected a finite number"),
        ("huge", "for sample 0; expected a finite number"),
        ("nothing", "reward 'r': test_functions:nothing raised TypeError"),
        ("dies", "reward 'r': test_functions:dies raised ProcessExpired"),
    ],
)
def test_a_function_that_fails(function: str, message: str, tokenizer_dir: str) -> None:
    with pytest.raises(ValueError) as caught:
        scorer(tokenizer_dir, {"function": f"test_functions:{function}"}).score(CHUNK, prompts(), True)
    assert message in str(caught.value)


def test_a_function_that_hangs_is_ended_at_its_limit_and_starts_anew(tokenizer_dir: str) -> None:
    process = scorer(tokenizer_dir, {"function": "test_functions:hangs", "timeout": 5})
    assert process.score(CHUNK, prompts(first=1), True)[0]["score"].to_pylist() == [1, 1, 1]
    began = time.monotonic()
    with pytest.raises(ValueError, match="reward 'r': test_functions:hangs took longer than 5 s for 3 samples"):
        process.score(CHUNK, prompts(), True)
    assert time.monotonic() - began < 30
    assert process.score(CHUNK, prompts(first=1), True)[0]["score"].to_pylist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "function 'no_such_module:f': cannot import no_such_module"),
        ("test_functions:lenght", "module test_functions has no function 'lenght'"),
        ("test_functions:value", "module test_functions has no function 'value'"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_the_start(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(name)


# How such a failure arrives in the driver


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (ValueError("bad row"), ValueError),
        (json.JSONDecodeError("bad", "doc", 0), ValueError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError),
        (FloatingPointError("bad loss"), FloatingPointError),
        (KeyError("bad key"), WorkerFailed),
    ],
)
def test_the_drivers_exception_says_who_and_why(cause: Exception, kind: type[Exception]) -> None:
    found = from_task_error(RayTaskError("score", "the remote traceback", cause), "reward, scoring")
    assert type(found) is kind
    assert str(found).startswith("reward, scoring: ")
    assert "bad" in str(found)


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        ("ValueError: header 'X': no such\nvariable", ValueError, "start of reward: header 'X': no such\nvariable"),
        ("KeyError: 'X'", WorkerFailed, "start of reward: the process died. "),
        ("ValueError: x\n\nDuring another:\n  File 'y'\nKeyError: 'X'", WorkerFailed, "start of reward: the process"),
    ],
)
def test_a_mistake_that_a_constructor_finds(end: str, kind: type[Exception], message: str) -> None:
    traceback = f"ray::Scorer.__init__()\n  File 'scorer.py', line 1, in __init__\n{end}"
    found = explained(ActorDiedError(RayTaskError("__init__", traceback, ValueError())), "start of reward")
    assert type(found) is kind
    assert str(found).startswith(message)
