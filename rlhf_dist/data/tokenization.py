"""Tokenizers, the form in which prompts are written, and token tables.

A prompt of messages is written by the tokenizer's chat template where it has
one, else in the plain form of HH: ``\\n\\nHuman: ...\\n\\nAssistant:``, after which
a response begins with one space. A prompt of raw text stands as it is. The last
two begin with the BOS token where the tokenizer has one; every response ends with
EOS. Prompt and response are tokenized apart, exactly as in generation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_dist import schema
from rlhf_dist.data import labels
from rlhf_dist.data.formats import Example, Message

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
PLAIN_TAGS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\n"}
# The bytes and the special tokens: a byte-level BPE cannot be smaller.
MIN_BPE_SIZE = 256 + len(SPECIAL)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with a padding token.

    Raises:
        ValueError: it cannot be loaded, or has no EOS token, without which no response ends.
    """
    try:
        tokenizer = _tokenizer_class(name).from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model.tokenizer: cannot load a tokenizer from {name}: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.tokenizer: the tokenizer of {name} has no EOS token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(name: str) -> Any:
    """The class that a folder names, where that is the general one; else ``AutoTokenizer``, to find out.

    To import ``AutoTokenizer`` of transformers 5 takes 5 CPU seconds, torch and the code of generation among it, which
    a run would pay in every process that has a tokenizer.
    """
    try:
        about = json.loads((Path(name) / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        about = {}
    if about.get("tokenizer_class") == PreTrainedTokenizerFast.__name__ and "auto_map" not in about:
        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, special ones included, trained on ``texts``.

    It encodes any text without an unknown token. Raises ValueError where ``vocab_size`` has no room for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_SIZE:
        raise ValueError(f"model.tokenizer_vocab_size={vocab_size} is too small: byte-level BPE needs {MIN_BPE_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def load_or_train_tokenizer(
    name: str | None,
    texts: Iterable[str],
    vocab_size: int,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``name`` (folder or hub), or one trained on ``texts`` where no name is given."""
    tokenizer = load_tokenizer(name, trust_remote_code) if name else train_tokenizer(texts, vocab_size)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write the files that ``AutoTokenizer``, vLLM and :func:`load_tokenizer` read."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


def format_prompt(tokenizer: PreTrainedTokenizerBase, row: Example) -> str:
    """The prompt exactly as the model reads it, BOS token included where there is one.

    A chat template decides itself whether it writes BOS.
    """
    bos = tokenizer.bos_token or ""
    if row.text is not None:
        return bos + row.text
    assert row.messages is not None
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True))
    return bos + _plain(row.messages)


def _plain(messages: Sequence[Message]) -> str:
    return "".join(PLAIN_TAGS[m["role"]] + m["content"].strip() for m in messages) + PLAIN_TAGS["assistant"].rstrip(" ")


def _response_text(tokenizer: PreTrainedTokenizerBase, row: Example, response: str) -> str:
    return response if row.text is not None or tokenizer.chat_template else " " + response.strip()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[list[int]]:
    return _encode(tokenizer, [format_prompt(tokenizer, row) for row in rows])


def _response_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in _encode(tokenizer, texts)]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def _continuation_ids(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], responses: Sequence[str]
) -> list[list[int]]:
    """Response tokens, EOS included.

    Tokenizers of the SentencePiece kind put a space before every text they are given, which would stand between a raw
    text and its continuation: there the response is what the whole text has beyond the prompt, where that splits.
    """
    apart = _response_ids(tokenizer, [_response_text(tokenizer, r, t) for r, t in zip(rows, responses, strict=True)])
    raw = [i for i, row in enumerate(rows) if row.text is not None]
    prompts = _encode(tokenizer, [format_prompt(tokenizer, rows[i]) for i in raw])
    whole = _response_ids(tokenizer, [format_prompt(tokenizer, rows[i]) + responses[i] for i in raw])
    for i, prompt, ids in zip(raw, prompts, whole, strict=True):
        if ids[: len(prompt)] == prompt:
            apart[i] = ids[len(prompt) :]
    return apart


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int
) -> tuple[pa.Table, int]:
    """A table of ``schema.PROMPT`` and the number of prompts left out, longer than ``max_length`` tokens.

    ``prompt_id`` is the row's number in the table; ``prompt`` is the text without BOS.
    """
    all_ids = _prompt_ids(tokenizer, rows)
    kept = [i for i, ids in enumerate(all_ids) if len(ids) <= max_length]
    bos = tokenizer.bos_token or ""
    columns = {
        "prompt_id": list(range(len(kept))),
        "prompt_ids": [all_ids[i] for i in kept],
        "prompt": [format_prompt(tokenizer, rows[i]).removeprefix(bos) for i in kept],
        "fields": [json.dumps(rows[i].fields, default=str) for i in kept],
    }
    return pa.table(columns, schema=schema.PROMPT), len(rows) - len(kept)


def tokenize_demonstrations(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int
) -> tuple[pa.Table, int]:
    """A table of ``schema.DEMONSTRATION`` and the number left out, longer than ``max_length`` in all."""
    prompts = _prompt_ids(tokenizer, rows)
    responses = _continuation_ids(tokenizer, rows, [str(row.response) for row in rows])
    kept = [i for i in range(len(rows)) if len(prompts[i]) + len(responses[i]) <= max_length]
    columns = {"prompt_ids": [prompts[i] for i in kept], "response_ids": [responses[i] for i in kept]}
    return pa.table(columns, schema=schema.DEMONSTRATION), len(rows) - len(kept)


def _responses_to_compare(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[list[list[int]]]:
    flat = [(row, text) for row in rows for text in row.responses]
    ids = iter(_continuation_ids(tokenizer, [row for row, _ in flat], [text for _, text in flat]))
    return [[next(ids) for _ in row.responses] for row in rows]


def tokenize_comparisons(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int
) -> tuple[pa.Table, int]:
    """A table of ``schema.COMPARISON``, one row for each pair that was compared, and the number of pairs left out,
    whose longer side exceeds ``max_length`` in all. Chosen is what more annotators prefer, or the first of a tie."""
    table: dict[str, list[Any]] = {field.name: [] for field in schema.COMPARISON}
    too_long = 0
    texts = zip(_prompt_ids(tokenizer, rows), _responses_to_compare(tokenizer, rows), strict=True)
    for row, (prompt, responses) in zip(rows, texts, strict=True):
        for chosen, rejected, preference in labels.compared(responses, row.preferences):
            if len(prompt) + max(len(chosen), len(rejected)) > max_length:
                too_long += 1
                continue
            pair = (prompt, chosen, rejected, preference, row.margin, row.source)
            for column, value in zip(table.values(), pair, strict=True):
                column.append(value)
    return pa.table(table, schema=schema.COMPARISON), too_long


def tokenize_rankings(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int
) -> tuple[pa.Table, int]:
    """A table of ``schema.RANKING`` and the number left out, whose longest response exceeds ``max_length`` in all."""
    prompts, responses = _prompt_ids(tokenizer, rows), _responses_to_compare(tokenizer, rows)
    fits = [len(p) + max(map(len, r)) <= max_length for p, r in zip(prompts, responses, strict=True)]
    kept = [i for i, fit in enumerate(fits) if fit]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [prompts[i] for i in kept],
        "responses": [responses[i] for i in kept],
        "preferences": [rows[i].preferences for i in kept],
    }
    return pa.table(columns, schema=schema.RANKING), len(rows) - len(kept)


def tokenize_pretraining(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> pa.Table:
    """Whole texts, end of text included, as :func:`pretraining_table`."""
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return pretraining_table([[*bos, *ids] for ids in _response_ids(tokenizer, texts)], max_length)


def pretraining_table(texts: Iterable[Sequence[int]], max_length: int) -> pa.Table:
    """Pieces of at most ``max_length`` tokens as ``schema.DEMONSTRATION``: the first token is given, the rest learned.

    Pieces of a single token have nothing to learn and are left out.
    """
    pieces = [ids[i : i + max_length] for ids in texts for i in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    columns = {"prompt_ids": [p[:1] for p in pieces], "response_ids": [p[1:] for p in pieces]}
    return pa.table(columns, schema=schema.DEMONSTRATION)


def training_texts(rows: Iterable[Example]) -> Iterator[str]:
    """What a tokenizer is trained on: prompts in the plain form, and responses."""
    for row in rows:
        yield row.text if row.text is not None else _plain(row.messages or [])
        for response in dict.fromkeys((row.response, *row.responses)):
            if response:
                yield response if row.text is not None else " " + response.strip()
