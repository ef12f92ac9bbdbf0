"""Reward functions that come with the package: f(prompts, responses, fields) -> one number for each response.

Name one in the config as ``reward.components: [{name: ..., function: "rlhf_dist.data.rewards:gsm8k_answer"}]``.
``fields`` are the prompt rows' other keys. A function must be pure: it runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"####\s*\$?\s*(-?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)")

_JOYFUL_ROOTS = """
happy happily happiness / joy joyful / glad / smile smiles smiled smiling / laugh laughs laughed laughing / fun funny
love loves loved lovely / hug hugs hugged hugging / play plays played playing / friend friends / kind kindness / nice
good / great / proud proudly / excited exciting / cheer cheered cheerful / sing sang singing / dance danced dancing
thank thanked thanks / beautiful / pretty / sweet / enjoy enjoyed enjoying / wonderful / amazing / best / party / gift
surprise surprised / share shared sharing
"""
#: Joyful words and the number of their root: forms of one word count once.
JOYFUL = {w: i for i, root in enumerate(re.split(r"[/\n]", _JOYFUL_ROOTS)) for w in root.split()}
JOYFUL_ENOUGH = 5


def gsm8k_answer(prompts: Sequence[str], responses: Sequence[str], fields: Sequence[dict[str, Any]]) -> list[float]:
    """1.0 where the number after the first ``####`` of the response equals ``fields["answer"]``, else 0.0.

    ``$``, thousands commas and spaces around the number do not matter; 12 equals 12.0. The first ``####`` counts, so
    that listing many guesses does not pay.
    """
    if any("answer" not in f for f in fields):
        raise ValueError("gsm8k_answer needs the field 'answer' in every prompt row; use data.format=gsm8k")
    return [float(_same_number(_final_number(r), str(f["answer"]))) for r, f in zip(responses, fields, strict=True)]


def _final_number(response: str) -> float | None:
    marker = response.find("####")
    match = _NUMBER.match(response, marker) if marker >= 0 else None
    return float(match[1] + match[2].replace(",", "")) if match else None


def _same_number(found: float | None, expected: str) -> bool:
    return found is not None and math.isclose(found, float(expected.replace(",", "")), rel_tol=1e-9, abs_tol=1e-9)


def happy_words(prompts: Sequence[str], responses: Sequence[str], fields: Sequence[dict[str, Any]]) -> list[float]:
    """How joyful a story is: distinct joyful words of the response that the prompt does not have, out of five.

    In [0, 1]. Repeating a word or bending it (smile, smiled) earns nothing, and more than five earn nothing: a
    cheerful story reaches the maximum, a list of words gains nothing over it.
    """
    return [_joy(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _joy(prompt: str, response: str) -> float:
    return min(len(_roots(response) - _roots(prompt)), JOYFUL_ENOUGH) / JOYFUL_ENOUGH


def _roots(text: str) -> set[int]:
    return {JOYFUL[word] for word in re.findall(r"[a-z]+", text.lower()) if word in JOYFUL}
