"""What one raw row of each ``data.format`` means: a prompt, a demonstration, a comparison.

``parse(format, row, purpose)`` turns a raw row into an :class:`Example`; a faulty row
raises :class:`rlhf_dist.data.readers.BadRow` with the reason, to which the
reader adds file and line. A comparison's chosen side is its demonstration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_dist.data.readers import BadRow

Message = dict[str, str]
Purpose = Literal["prompts", "demonstrations", "comparisons"]

ROLES = ("system", "user", "assistant")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
OPENING_WORDS = (8, 16)


@dataclass(frozen=True)
class Example:
    """One row. The prompt is ``messages`` (the last one not the assistant's), or ``text`` that is continued.

    ``fields`` are what reward functions and tables by group may read: the row's other keys.
    """

    messages: list[Message] | None = None
    text: str | None = None
    response: str | None = None
    rejected: str | None = None
    margin: float = 0.0
    source: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def parse(format: str, row: dict[str, Any], purpose: Purpose = "prompts") -> Example:
    """The meaning of a raw row. Raises BadRow with the reason where it has none, or cannot serve the purpose."""
    example = _PARSERS[format](row)
    if purpose == "demonstrations" and example.response is None:
        raise BadRow("the row has a prompt, but no response to demonstrate")
    return example


def check_purpose(format: str, purpose: Purpose) -> None:
    """Raises ValueError where rows of a format can never serve a purpose."""
    if purpose not in PURPOSES[format]:
        able = [name for name, purposes in PURPOSES.items() if purpose in purposes]
        raise ValueError(f"data.format={format} holds no {purpose}; formats that do: world, {', '.join(able)}")


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise BadRow(f"key {key!r} is missing; the row has {sorted(row)}")
    if not isinstance(row[key], str):
        raise BadRow(f"{key!r} must be a string, got {type(row[key]).__name__}")
    if not row[key].strip():
        raise BadRow(f"{key!r} is empty")
    return row[key]


def _others(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def hh(row: dict[str, Any]) -> Example:
    """Anthropic's HH: ``chosen`` and ``rejected`` are whole transcripts that share all but the last turn."""
    chosen, rejected = _transcript(row, "chosen"), _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same text")
    return Example(
        messages=chosen[:-1],
        response=chosen[-1]["content"],
        rejected=rejected[-1]["content"],
        source=str(row.get("source", "")),
        fields=_others(row, "chosen", "rejected"),
    )


def _transcript(row: dict[str, Any], key: str) -> list[Message]:
    before, *parts = HH_TURN.split(_text(row, key))
    if not parts:
        raise BadRow(f"{key!r} has no '\\n\\nHuman:' or '\\n\\nAssistant:' turn")
    if before.strip():
        raise BadRow(f"{key!r} has text before its first turn: {before[:40]!r}")
    messages = []
    for i, (speaker, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if speaker != ("Human", "Assistant")[i % 2]:
            raise BadRow(f"{key!r}: turns do not alternate, turn {i + 1} is the {speaker}'s")
        if not text.strip():
            raise BadRow(f"{key!r}: turn {i + 1} ({speaker}) is empty")
        tag = re.search(r"(?:^|\s)(Human|Assistant):", text)
        if tag:
            raise BadRow(f"{key!r}: turn {i + 1} has the tag '{tag[1]}:' inside a line")
        messages.append({"role": ("user", "assistant")[i % 2], "content": text.strip()})
    if len(messages) % 2:
        raise BadRow(f"{key!r}: the last turn is not the Assistant's")
    return messages


def messages(row: dict[str, Any]) -> Example:
    """Chat: ``messages`` is a list of {role, content}; a last assistant message is the demonstration."""
    turns = _messages(row, "messages")
    response = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
    prompt = turns[:-1] if response is not None else turns
    return Example(messages=_checked_prompt(prompt, "messages"), response=response, fields=_others(row, "messages"))


def _messages(row: dict[str, Any], key: str) -> list[Message]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{key!r} must be a list of {{role, content}}, got {turns!r:.40}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise BadRow(f"{key!r}: message {i + 1} must be {{role, content}} with a string content, got {turn!r:.60}")
        if turn.get("role") not in ROLES:
            raise BadRow(f"{key!r}: message {i + 1} has role {turn.get('role')!r}, expected one of {', '.join(ROLES)}")
        if not turn["content"].strip():
            raise BadRow(f"{key!r}: message {i + 1} ({turn['role']}) is empty")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _checked_prompt(turns: list[Message], key: str) -> list[Message]:
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise BadRow(f"{key!r}: a system message may stand first only")
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise BadRow(f"{key!r}: user and assistant must alternate, beginning with user; got {spoken}")
    if spoken[-1] != "user":
        raise BadRow(f"{key!r}: the prompt must end with the user's message")
    return turns


def plain_text(row: dict[str, Any]) -> Example:
    """Pretraining text: ``text``, whatever ``data.format`` says of the other files."""
    return Example(text=_text(row, "text"))


def preferences(row: dict[str, Any]) -> Example:
    """``prompt`` (text or messages), ``chosen``, ``rejected``, and optionally ``margin`` >= 0 and ``source``."""
    if isinstance(row.get("prompt"), list):
        turns = _checked_prompt(_messages(row, "prompt"), "prompt")
    else:
        turns = [{"role": "user", "content": _text(row, "prompt")}]
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
        raise BadRow(f"'margin' must be a number of at least 0, got {margin!r}")
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same text")
    return Example(
        messages=turns,
        response=chosen,
        rejected=rejected,
        margin=float(margin),
        source=str(row.get("source", "")),
        fields=_others(row, "prompt", "chosen", "rejected"),
    )


def prompts(row: dict[str, Any]) -> Example:
    """Raw text to be continued: ``prompt`` as it stands, or the opening of ``text`` (what .txt lines are read as).

    An opening is the first sentence, but at least 8 and at most 16 words; the rest of the text demonstrates how it
    may go on. Shorter texts are prompts without a demonstration.
    """
    if "prompt" in row:
        return Example(text=_text(row, "prompt"), fields=_others(row, "prompt"))
    text = _text(row, "text").strip() if "text" in row else _text(row, "prompt")
    words = list(re.finditer(r"\S+", text))
    least, most = OPENING_WORDS
    ends = (i for i, word in enumerate(words[:most], start=1) if i >= least and word[0].rstrip("\"'”’")[-1:] in ".!?")
    cut = words[next(ends, min(most, len(words))) - 1].end()
    return Example(text=text[:cut], response=text[cut:] or None, fields=_others(row, "text"))


def gsm8k(row: dict[str, Any]) -> Example:
    """Grade-school mathematics: ``question``, ``answer`` whose last line is ``#### NUMBER``; fields hold the number."""
    question, solution = _text(row, "question"), _text(row, "answer")
    final = solution.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    if "####" not in solution or not re.fullmatch(r"-?\d+(\.\d+)?", final):
        raise BadRow(f"'answer' must end with '#### NUMBER', got {solution[-40:]!r}")
    fields = _others(row, "question") | {"answer": final}
    return Example(messages=[{"role": "user", "content": question.strip()}], response=solution, fields=fields)


_PARSERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "hh": hh,
    "messages": messages,
    "preferences": preferences,
    "prompts": prompts,
    "gsm8k": gsm8k,
}

PURPOSES: dict[str, tuple[Purpose, ...]] = {
    "hh": ("prompts", "demonstrations", "comparisons"),
    "messages": ("prompts", "demonstrations"),
    "preferences": ("prompts", "demonstrations", "comparisons"),
    "prompts": ("prompts", "demonstrations"),
    "gsm8k": ("prompts", "demonstrations"),
}
