"""Reward functions: cases by hand, and that the obvious ways to cheat do not pay."""

from __future__ import annotations

import pytest

from rlhf_dist.data.rewards import gsm8k_answer, happy_words


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("6 * 3 = 18\n#### 18", "18", 1.0),
        ("#### $1,234", "1234", 1.0),
        ("#### $ -5", "-5", 1.0),
        ("#### -$5", "-5", 1.0),
        ("####12.0", "12", 1.0),
        ("#### 12.", "12", 1.0),
        ("#### 1,234.50 dollars", "1234.5", 1.0),
        ("#### 19", "18", 0.0),
        ("18", "18", 0.0),
        ("#### about 18", "18", 0.0),
        ("####", "18", 0.0),
        ("#### 17\n#### 18", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_gsm8k_answer(response: str, answer: str, expected: float) -> None:
    assert gsm8k_answer(["q"], [response], [{"answer": answer}]) == [expected]


def test_gsm8k_answer_says_which_format_it_needs() -> None:
    with pytest.raises(ValueError, match=r"data\.format=gsm8k"):
        gsm8k_answer(["q"], ["#### 1"], [{}])


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("", "They were sad.", 0.0),
        ("", "She was happy. Happy! They hugged and played.", 0.6),
        ("", "smile smiled smiling smiles", 0.2),
        ("Tom was happy.", "Tom was happy.", 0.0),
        ("", "happy joy glad smile laugh fun love hug play friend", 1.0),
        ("", "happy " * 50, 0.2),
        ("", "unhappy", 0.0),
    ],
)
def test_happy_words(prompt: str, response: str, expected: float) -> None:
    assert happy_words([prompt], [response], [{}]) == pytest.approx([expected])
