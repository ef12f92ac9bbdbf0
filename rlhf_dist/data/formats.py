"""What one raw row of each ``data.format`` means: a prompt, a demonstration, responses that people compared.

``parse(format, row, purpose)`` turns a raw row into one :class:`Example`, or several; a faulty row
raises :class:`rlhf_dist.data.readers.BadRow` with its kind and the reason, to which the
reader adds file and line. The best of compared responses is the demonstration.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_dist.data import labels
from rlhf_dist.data.labels import Preferences
from rlhf_dist.data.readers import BadRow, Fault

Message = dict[str, str]
Purpose = Literal["prompts", "demonstrations", "comparisons", "rankings"]

ROLES = ("system", "user", "assistant")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
QA_PREDICTIONS = tuple(f"prediction {i}" for i in (1, 2, 3, 4))
OPENING_WORDS = (8, 16)


@dataclass(frozen=True)
class Example:
    """One row. The prompt is ``messages`` (the last one not the assistant's), or ``text`` that is continued.

    ``response`` is the demonstration. ``responses`` are those that people compared, ``preferences`` what they found for
    each pair of them (:mod:`rlhf_dist.data.labels`); a comparison is a ranking of two. ``margin``: how much better the
    first of two is. ``fields`` are what reward functions and tables by group may read: the row's other keys.
    """

    messages: list[Message] | None = None
    text: str | None = None
    response: str | None = None
    responses: tuple[str, ...] = ()
    preferences: Preferences = ()
    margin: float = 0.0
    source: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def parse(format: str, row: dict[str, Any], purpose: Purpose = "prompts") -> list[Example]:
    """The meaning of a raw row. Raises BadRow with the reason where it has none, or cannot serve the purpose."""
    examples = _PARSERS[format](row)
    if purpose == "demonstrations" and any(example.response is None for example in examples):
        raise BadRow("no response", "the row has a prompt, but no response to demonstrate")
    return examples


def check_purpose(format: str, purpose: Purpose) -> None:
    """Raises ValueError where rows of a format can never serve a purpose."""
    if purpose not in PURPOSES[format]:
        able = [name for name, purposes in PURPOSES.items() if purpose in purposes]
        raise ValueError(f"data.format={format} holds no {purpose}; formats that do: world, {', '.join(able)}")


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise BadRow("missing key", f"key {key!r} is missing; the row has {sorted(row)}")
    if not isinstance(row[key], str):
        raise BadRow("wrong type", f"{key!r} must be a string, got {type(row[key]).__name__}")
    if not row[key].strip():
        raise BadRow("empty text", f"{key!r} is empty")
    return row[key]


def _list(row: dict[str, Any], key: str, kind: type, what: str) -> list[Any]:
    if key not in row:
        raise BadRow("missing key", f"key {key!r} is missing; the row has {sorted(row)}")
    if not isinstance(row[key], list) or not all(isinstance(item, kind) for item in row[key]):
        raise BadRow("wrong type", f"{key!r} must be a list of {what}, got {row[key]!r:.60}")
    return row[key]


def _others(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def hh(row: dict[str, Any]) -> list[Example]:
    """Anthropic's HH: ``chosen`` and ``rejected`` are whole transcripts that share all but the last turn."""
    chosen, rejected = _transcript(row, "chosen"), _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("prompts differ", "the prompts of 'chosen' and 'rejected' differ")
    sides = chosen[-1]["content"], rejected[-1]["content"]
    _check_different(sides)
    example = Example(
        messages=chosen[:-1],
        response=sides[0],
        responses=sides,
        preferences=(1.0,),
        source=str(row.get("source", "")),
        fields=_others(row, "chosen", "rejected"),
    )
    return [example]


def _check_different(responses: Sequence[str]) -> None:
    for text, count in Counter(responses).items():
        if count > 1:
            raise BadRow("same text", f"{count} of the responses to compare are the same text: {text!r:.60}")


def _transcript(row: dict[str, Any], key: str) -> list[Message]:
    before, *parts = HH_TURN.split(_text(row, key))
    if not parts:
        raise BadRow("no turn", f"{key!r} has no '\\n\\nHuman:' or '\\n\\nAssistant:' turn")
    if before.strip():
        raise BadRow("text before the first turn", f"{key!r} has text before its first turn: {before[:40]!r}")
    messages: list[Message] = []
    for i, (speaker, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if speaker != ("Human", "Assistant")[i % 2]:
            raise BadRow("turns do not alternate", f"{key!r}: turns do not alternate, turn {i + 1} is the {speaker}'s")
        if not text.strip():
            answer = speaker == "Assistant" and i == len(parts) // 2 - 1
            kind: Fault = "empty response" if answer else "empty turn"
            raise BadRow(kind, f"{key!r}: turn {i + 1} ({speaker}) is empty")
        tag = re.search(r"(?:^|\s)(Human|Assistant):", text)
        if tag:
            raise BadRow("tag inside a line", f"{key!r}: turn {i + 1} has the tag '{tag[1]}:' inside a line")
        messages.append({"role": ("user", "assistant")[i % 2], "content": text.strip()})
    if len(messages) % 2:
        raise BadRow("last turn not the assistant's", f"{key!r}: the last turn is not the Assistant's")
    return messages


def messages(row: dict[str, Any]) -> list[Example]:
    """Chat: ``messages`` is a list of {role, content}; a last assistant message is the demonstration."""
    turns = _messages(row, "messages")
    response = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
    prompt = turns[:-1] if response is not None else turns
    prompt = _checked_prompt(prompt, "messages")
    return [Example(messages=prompt, response=response, fields=_others(row, "messages"))]


def _messages(row: dict[str, Any], key: str) -> list[Message]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow("wrong type", f"{key!r} must be a list of {{role, content}}, got {turns!r:.40}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            reason = f"{key!r}: message {i + 1} must be {{role, content}} with a string content, got {turn!r:.60}"
            raise BadRow("wrong type", reason)
        if turn.get("role") not in ROLES:
            reason = f"{key!r}: message {i + 1} has role {turn.get('role')!r}, expected one of {', '.join(ROLES)}"
            raise BadRow("unknown role", reason)
        if not turn["content"].strip():
            raise BadRow("empty turn", f"{key!r}: message {i + 1} ({turn['role']}) is empty")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _checked_prompt(turns: list[Message], key: str) -> list[Message]:
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise BadRow("system message not first", f"{key!r}: a system message may stand first only")
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        reason = f"{key!r}: user and assistant must alternate, beginning with user; got {spoken}"
        raise BadRow("turns do not alternate", reason)
    if spoken[-1] != "user":
        raise BadRow("last turn not the user's", f"{key!r}: the prompt must end with the user's message")
    return turns


def plain_text(row: dict[str, Any]) -> list[Example]:
    """Pretraining text: ``text``, whatever ``data.format`` says of the other files."""
    return [Example(text=_text(row, "text"))]


def instructions(row: dict[str, Any]) -> list[Example]:
    """Instruction data: ``instruction``, optionally ``input``, and ``output``; or self-instruct's ``instances``, a list
    of {input, output}, each of which is an example."""
    instruction = _text(row, "instruction").strip()
    instances = _list(row, "instances", dict, "{input, output}") if "instances" in row else [row]
    if not instances:
        raise BadRow("no response", "'instances' is empty")
    examples = []
    for instance in instances:
        given = _text(instance, "input").strip() if instance.get("input") else ""
        prompt = f"{instruction}\n\n{given}" if given else instruction
        examples.append(
            Example(
                messages=[{"role": "user", "content": prompt}],
                response=_text(instance, "output") if "output" in instance else None,
                fields=_others(row, "instruction", "instances", "input", "output"),
            )
        )
    return examples


def _prompt(row: dict[str, Any]) -> list[Message]:
    """``prompt``, a text or messages; or Open Assistant's ``conversation``, messages with other names."""
    if isinstance(row.get("prompt"), list):
        return _checked_prompt(_messages(row, "prompt"), "prompt")
    if "conversation" not in row:
        return [{"role": "user", "content": _text(row, "prompt")}]
    turns = _list(row, "conversation", dict, "{role, text}")
    renamed = [{"role": OASST_ROLES.get(str(t.get("role")), t.get("role")), "content": t.get("text")} for t in turns]
    return _checked_prompt(_messages({"conversation": renamed}, "conversation"), "conversation")


def preferences(row: dict[str, Any]) -> list[Example]:
    """``prompt`` (text or messages), ``chosen``, ``rejected``. Optionally ``margin`` >= 0, ``source``, and what several
    annotators said: ``votes``, a number for each side, or ``labels``, a list of "chosen", "rejected" and "tie"."""
    turns = _prompt(row)
    margin = row.get("margin", 0.0)
    if not _is_number(margin) or margin < 0:
        raise BadRow("wrong margin", f"'margin' must be a number of at least 0, got {margin!r}")
    sides = _text(row, "chosen"), _text(row, "rejected")
    _check_different(sides)
    share = _share(row)
    if margin and share <= 0.5:
        reason = f"'margin' is {margin} in favour of 'chosen', but only {share:.2f} of the annotators prefer it"
        raise BadRow("wrong margin", reason)
    example = Example(
        messages=turns,
        response=sides[share < 0.5],
        responses=sides,
        preferences=(share,),
        margin=float(margin),
        source=str(row.get("source", "")),
        fields=_others(row, "prompt", "chosen", "rejected"),
    )
    return [example]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _share(row: dict[str, Any]) -> float:
    """Share of the annotators who prefer ``chosen``; a tie counts half."""
    found, votes = row.get("labels"), row.get("votes")
    if found is not None and votes is not None:
        raise BadRow("wrong labels", "'votes' and 'labels' are both given: which one is it?")
    if found is not None:
        values = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
        if not isinstance(found, list) or not found or any(label not in list(values) for label in found):
            raise BadRow("wrong labels", f"'labels' must be a list of {', '.join(values)}, got {found!r:.60}")
        return sum(values[label] for label in found) / len(found)
    if votes is None:
        return 1.0
    good = isinstance(votes, list) and len(votes) == 2 and all(_is_number(v) and v >= 0 for v in votes)
    if not good or not sum(votes):
        reason = f"'votes' must be two numbers, for 'chosen' and for 'rejected', not both 0; got {votes!r:.60}"
        raise BadRow("wrong labels", reason)
    return votes[0] / sum(votes)


def rankings(row: dict[str, Any]) -> list[Example]:
    """``prompt`` or ``conversation``, and ``responses``, best first. Optionally ``source`` and ``ranks``: a number for
    each response, the lowest is best, equal ones tie; or a list of such lists, one from each annotator."""
    responses = _list(row, "responses", str, "texts")
    _check_responses(responses)
    ranks = row.get("ranks", list(range(len(responses))))
    annotators = ranks if isinstance(ranks, list) and any(isinstance(one, list) for one in ranks) else [ranks]
    for one in annotators:
        if not isinstance(one, list) or len(one) != len(responses) or not all(map(_is_number, one)):
            reason = f"'ranks' must have a number for each of the {len(responses)} responses, got {one!r:.60}"
            raise BadRow("wrong labels", reason)
    places = [sum(of_one) for of_one in zip(*annotators, strict=True)]
    example = Example(
        messages=_prompt(row),
        response=responses[places.index(min(places))],
        responses=tuple(responses),
        preferences=labels.pooled([labels.by_rank(one) for one in annotators]),
        source=str(row.get("source", "")),
        fields=_others(row, "prompt", "conversation", "responses", "ranks"),
    )
    return [example]


def _check_responses(responses: Sequence[str]) -> None:
    if len(responses) < 2:
        raise BadRow("too few responses", f"to compare takes at least 2 responses, got {len(responses)}")
    for i, text in enumerate(responses, start=1):
        if not text.strip():
            raise BadRow("empty response", f"response {i} is empty")
    _check_different(responses)


def qa_feedback(row: dict[str, Any]) -> list[Example]:
    """Fine-Grained RLHF (2306.01693): answers from passages. ``question``, ``passages`` (lists of sentences, the first
    is the title; there may be none), ``prediction 1`` to ``prediction 4``, and ``preference`` for their pairs 12 13 14
    23 24 34: 0 for a tie, 1 or 2 for the better one of the two. ``gold``, if there, is the demonstration."""
    passages = _list(row, "passages", list, "lists of sentences")
    predictions = tuple(_text(row, key) for key in QA_PREDICTIONS)
    _check_responses(predictions)
    found = row.get("preference")
    values = {0: 0.5, 1: 1.0, 2: 0.0}
    if not isinstance(found, list) or len(found) != 6 or any(label not in list(values) for label in found):
        raise BadRow("wrong labels", f"'preference' must be six of 0, 1 and 2, got {found!r:.60}")
    parts = [*(" ".join(map(str, sentences)) for sentences in passages), f"Question: {_text(row, 'question').strip()}"]
    example = Example(
        messages=[{"role": "user", "content": "\n\n".join(parts)}],
        response=_text(row, "gold") if "gold" in row else None,
        responses=predictions,
        preferences=tuple(values[label] for label in found),
        source=str(row.get("source", "")),
        fields=_others(row, "passages", "preference", "gold", "feedback", *QA_PREDICTIONS),
    )
    return [example]


def voted(row: dict[str, Any]) -> list[Example]:
    """A question on a site where people vote: ``prompt``, and ``answers``, a list of {text, votes} of which one may be
    ``accepted``. Of two answers the one with the higher score is better (:func:`labels.vote_score`); equal scores say
    nothing. Weak preferences, for a first training of a reward model (Askell et al., 2112.00861)."""
    answers = _list(row, "answers", dict, "{text, votes}")
    for i, answer in enumerate(answers, start=1):
        votes, accepted = answer.get("votes"), answer.get("accepted", False)
        if not isinstance(votes, int) or isinstance(votes, bool) or not isinstance(accepted, bool):
            reason = f"answer {i} needs 'votes', a whole number, and 'accepted' true or false: {votes!r}, {accepted!r}"
            raise BadRow("wrong labels", reason)
    texts = [_text(answer, "text") for answer in answers]
    _check_responses(texts)
    scores = [labels.vote_score(answer["votes"], answer.get("accepted", False)) for answer in answers]
    example = Example(
        messages=_prompt(row),
        response=texts[scores.index(max(scores))],
        responses=tuple(texts),
        preferences=tuple(labels.NOT_COMPARED if p == 0.5 else p for p in labels.by_score(scores)),
        source=str(row.get("source", "")),
        fields=_others(row, "prompt", "answers"),
    )
    return [example]


def prompts(row: dict[str, Any]) -> list[Example]:
    """Raw text to be continued: ``prompt`` as it stands, or the opening of ``text`` (what .txt lines are read as).

    An opening is the first sentence, but at least 8 and at most 16 words; the rest of the text demonstrates how it
    may go on. Shorter texts are prompts without a demonstration.
    """
    if "prompt" in row:
        return [Example(text=_text(row, "prompt"), fields=_others(row, "prompt"))]
    text = _text(row, "text").strip() if "text" in row else _text(row, "prompt")
    words = list(re.finditer(r"\S+", text))
    least, most = OPENING_WORDS
    ends = (i for i, word in enumerate(words[:most], start=1) if i >= least and word[0].rstrip("\"'”’")[-1:] in ".!?")
    cut = words[next(ends, min(most, len(words))) - 1].end()
    return [Example(text=text[:cut], response=text[cut:] or None, fields=_others(row, "text"))]


def gsm8k(row: dict[str, Any]) -> list[Example]:
    """Grade-school mathematics: ``question``, ``answer`` whose last line is ``#### NUMBER``; fields hold the number."""
    question, solution = _text(row, "question"), _text(row, "answer")
    final = solution.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    if "####" not in solution or not re.fullmatch(r"-?\d+(\.\d+)?", final):
        raise BadRow("no final number", f"'answer' must end with '#### NUMBER', got {solution[-40:]!r}")
    fields = _others(row, "question") | {"answer": final}
    return [Example(messages=[{"role": "user", "content": question.strip()}], response=solution, fields=fields)]


_PARSERS: dict[str, Callable[[dict[str, Any]], list[Example]]] = {
    "hh": hh,
    "messages": messages,
    "preferences": preferences,
    "prompts": prompts,
    "gsm8k": gsm8k,
    "instructions": instructions,
    "rankings": rankings,
    "qa_feedback": qa_feedback,
    "voted": voted,
}

PURPOSES: dict[str, tuple[Purpose, ...]] = {
    "hh": ("prompts", "demonstrations", "comparisons"),
    "messages": ("prompts", "demonstrations"),
    "preferences": ("prompts", "demonstrations", "comparisons"),
    "prompts": ("prompts", "demonstrations"),
    "gsm8k": ("prompts", "demonstrations"),
    "instructions": ("prompts", "demonstrations"),
    "rankings": ("prompts", "demonstrations", "comparisons", "rankings"),
    "qa_feedback": ("prompts", "demonstrations", "comparisons", "rankings"),
    "voted": ("prompts", "demonstrations", "comparisons", "rankings"),
}
