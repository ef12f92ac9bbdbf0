"""From the config to token tables: what the recipes call, inside Ray tasks.

Each ``load_*`` returns a table of :mod:`rlhf_dist.schema` and a report:

    rows       rows of the table
    skipped    faulty rows (the first messages, with file and line, are in ``messages``)
    faults     how many of them have which fault, the most frequent first
    too_long   rows left out because they exceed the configured length
    held_out   training rows left out because their prompt belongs to the held-out set
    tied       pairs left out because neither side is better (comparisons and rankings)
    no_pair    prompts left out because no pair of their responses is left (comparisons and rankings)

Held out are the prompts of ``data.test``; where no such file is given, one
training prompt in twenty, chosen by a hash of its text.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rlhf_dist.config import COMPARISON_FORMATS, Config, DistillConfig
from rlhf_dist.data import compare, formats, labels, tokenization, world
from rlhf_dist.data.formats import Example, Purpose
from rlhf_dist.data.preferences import flip_labels
from rlhf_dist.data.prompts import some_rows
from rlhf_dist.data.ragged import Ragged
from rlhf_dist.data.readers import RowErrors, read_rows

Split = Literal["train", "test"]
Report = dict[str, Any]

HELD_OUT_ONE_IN = 20


def make_tokenizer(cfg: Config, out_dir: str) -> Report:
    """Write the run's tokenizer to ``out_dir``: the configured one, the world's, or one trained on the training rows.

    Returns ``vocab_size`` (the embedding rows that a model needs), ``bos_token_id``, ``eos_token_id``,
    ``pad_token_id``, ``skipped``, ``faults``, ``messages``.
    """
    name = cfg.model.tokenizer or cfg.initial_model
    errors = RowErrors(cfg.data.on_bad_row)
    if name is None and cfg.data.format == "world":
        tokenizer: Any = world.build_tokenizer()
        if cfg.data.chat_template is not None:
            tokenizer.chat_template = cfg.data.chat_template
    else:
        rows = [] if name else _read(cfg, "train", "prompts", errors)[0]
        tokenizer = tokenization.load_or_train_tokenizer(
            name,
            tokenization.training_texts(rows),
            cfg.model.tokenizer_vocab_size,
            cfg.data.chat_template,
            cfg.model.trust_remote_code,
        )
    tokenization.save_tokenizer(tokenizer, out_dir)
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_fault_report(errors),
    }


def load_prompts(cfg: Config, tokenizer_dir: str, split: Split) -> tuple[pa.Table, Report]:
    """Prompts of at most ``rollout.max_prompt_length`` tokens, as ``schema.PROMPT``; ``prompt_id`` is the row."""
    errors, held_out = RowErrors(cfg.data.on_bad_row), 0
    if cfg.data.format == "world":
        rows = [_world_example(row) for row in _world_prompts(cfg, split)]
    else:
        rows, held_out = _read(cfg, split, "prompts", errors)
    tokenizer = tokenization.load_tokenizer(tokenizer_dir)
    table, too_long = tokenization.tokenize_prompts(tokenizer, rows, cfg.rollout.max_prompt_length)
    _check_rows(table, f"prompts within rollout.max_prompt_length={cfg.rollout.max_prompt_length}", too_long)
    return table, _report(table, errors, too_long, held_out)


def load_demonstrations(cfg: Config, tokenizer_dir: str, split: Split, max_length: int) -> tuple[pa.Table, Report]:
    """Demonstrations of at most ``max_length`` tokens, as ``schema.DEMONSTRATION``.

    Held-out prompts need no response, so there may be no held-out demonstrations; the world has
    ``data.world.test_prompts`` of them.

    Raises:
        ValueError: the format holds none, or there is none to train on.
    """
    errors, held_out = RowErrors(cfg.data.on_bad_row), 0
    if cfg.data.format == "world":
        n = cfg.data.world.demonstrations if split == "train" else cfg.data.world.test_prompts
        rows = [_world_example(row) for row in world.make_demonstrations(cfg.seed, n, split)]
    else:
        rows, held_out = _read(cfg, split, "demonstrations" if split == "train" else "prompts", errors)
        rows = [row for row in rows if row.response is not None]
    tokenizer = tokenization.load_tokenizer(tokenizer_dir)
    table, too_long = tokenization.tokenize_demonstrations(tokenizer, rows, max_length)
    if split == "train":
        _check_rows(table, f"demonstrations within max_length={max_length}", too_long)
    return table, _report(table, errors, too_long, held_out)


def load_distillation(cfg: Config, tokenizer_dir: str, split: Split) -> tuple[pa.Table, Report]:
    """What a student learns from: ``schema.DEMONSTRATION`` and ``teacher_prompt_ids``, the prompt behind the context.

    Demonstrations, and a share ``distill.extra_share`` of pieces of plain text, in which every token but the first is
    a response. What the teacher reads has at most ``distill.max_length`` tokens; the report says how many as
    ``longest``, and the number of pieces as ``extra``. Held-out rows are ``distill.eval_rows`` at most, perhaps none.
    """
    d, tokenizer = cfg.distill, tokenization.load_tokenizer(tokenizer_dir)
    context = _context(d)
    table, report = load_demonstrations(cfg, tokenizer_dir, split, d.max_length)
    table = _behind(context, tokenizer, table)
    total = Ragged.of(table, "teacher_prompt_ids").lengths + Ragged.of(table, "response_ids").lengths
    kept, extra = table.filter(pa.array(total <= d.max_length)), 0
    report["too_long"] += table.num_rows - kept.num_rows
    if d.extra is not None:
        errors = RowErrors(cfg.data.on_bad_row)
        texts = _extra_text(cfg, tokenizer, context, split, errors)
        kept, extra = _mixed(kept, texts, d.extra_share, cfg.seed)
        report |= {"skipped": report["skipped"] + errors.count, "messages": report["messages"] + errors.messages}
    if split == "train":
        _check_rows(kept, f"rows within distill.max_length={d.max_length}, context included", report["too_long"])
    else:
        kept = kept.take(pa.array(some_rows(kept.num_rows, d.eval_rows, cfg.seed)))
    kept = kept.combine_chunks()
    longest = Ragged.of(kept, "teacher_prompt_ids").lengths + Ragged.of(kept, "response_ids").lengths
    return kept, report | {"rows": kept.num_rows, "extra": extra, "longest": int(longest.max(initial=0))}


def _context(cfg: DistillConfig) -> str:
    if cfg.context_file is None:
        return cfg.context
    try:
        return Path(cfg.context_file).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"distill.context_file={cfg.context_file} cannot be read: {error}") from None


def _behind(context: str, tokenizer: Any, table: pa.Table) -> pa.Table:
    """``table`` with ``teacher_prompt_ids``: the context goes behind the token that begins a text, if there is one."""
    ids = tokenizer(context, add_special_tokens=False)["input_ids"] if context else []
    prompts = Ragged.of(table, "prompt_ids")
    first = [int(prompt[0] == tokenizer.bos_token_id) for prompt in (prompts[i] for i in range(table.num_rows))]
    teacher = [[*prompts[i][:f].tolist(), *ids, *prompts[i][f:].tolist()] for i, f in enumerate(first)]
    return table.append_column("teacher_prompt_ids", pa.array(teacher, pa.list_(pa.int32())))


def _extra_text(cfg: Config, tokenizer: Any, context: str, split: Split, errors: RowErrors) -> pa.Table:
    """Pieces of the texts of ``distill.extra``, of which one in twenty is held out; a blank line ends the context."""
    assert cfg.distill.extra is not None
    context = f"{context}\n\n" if context else ""
    room = cfg.distill.max_length - len(tokenizer(context, add_special_tokens=False)["input_ids"])
    if room < 2:
        raise ValueError(f"distill.max_length={cfg.distill.max_length} has no room for text behind distill.context")
    rows = _parsed(cfg, cfg.distill.extra, "train", formats.plain_text, errors)
    texts = [row.text or "" for row in rows if _by_hash(row) == (split == "test")]
    return _behind(context, tokenizer, tokenization.tokenize_pretraining(tokenizer, texts, room))


def _mixed(a: pa.Table, b: pa.Table, share: float, seed: int) -> tuple[pa.Table, int]:
    """Random rows of both, a ``share`` of them from ``b``, as many as the scarcer one allows; and how many of ``b``."""
    total = int(min(a.num_rows / (1 - share), b.num_rows / share))
    n = round(total * share)
    parts = [t.take(pa.array(some_rows(t.num_rows, k, seed))) for t, k in ((a, total - n), (b, n))]
    return pa.concat_tables(parts), n


def load_pretrain(cfg: Config, tokenizer_dir: str) -> tuple[pa.Table, Report]:
    """Text for ``algo.ptx_coef``, every token but the first one a target, as ``schema.DEMONSTRATION``.

    The rows of ``data.pretrain``, cut into pieces of ``sft.max_length`` tokens; without such a file the
    demonstrations, prompts included.
    """
    if cfg.data.pretrain is None:
        table, report = load_demonstrations(cfg, tokenizer_dir, "train", cfg.sft.max_length)
        prompts, responses = Ragged.of(table, "prompt_ids"), Ragged.of(table, "response_ids")
        texts = [np.concatenate([prompts[i], responses[i]]) for i in range(table.num_rows)]
        return tokenization.pretraining_table(texts, cfg.sft.max_length), report
    errors = RowErrors(cfg.data.on_bad_row)
    rows = [row.text or "" for row in _parsed(cfg, cfg.data.pretrain, "train", formats.plain_text, errors)]
    tokenizer = tokenization.load_tokenizer(tokenizer_dir)
    table = tokenization.tokenize_pretraining(tokenizer, rows, cfg.sft.max_length)
    _check_rows(table, "pretraining text", 0)
    return table, _report(table, errors, 0, 0)


def load_comparisons(
    cfg: Config,
    tokenizer_dir: str,
    split: Split,
    max_length: int,
    compared: Sequence[str] = (),
    label_noise: float = 0.0,
) -> tuple[pa.Table, Report]:
    """Comparisons of at most ``max_length`` tokens a side, as ``schema.COMPARISON``: all pairs of rankings, too.

    Of the training split ``reward_model.ties`` and ``labels`` say what is learned of each pair; held-out pairs keep the
    share of the annotators, and those that tie are left out, because no score can be right or wrong about them.
    ``binarize`` makes two comparisons of each pair. The world's test pairs are twice ``data.world.test_prompts``, half
    of them with source "correctness".

    Args:
        compared: folders of comparisons that the run has collected (:mod:`rlhf_dist.data.compare`), which are learned
            beside those of the data.
        label_noise: share of the pairs whose label is flipped; the report says how many as ``flipped``.
    """
    errors, held_out = RowErrors(cfg.data.on_bad_row), 0
    tokenizer = tokenization.load_tokenizer(tokenizer_dir)
    if cfg.data.format == "world":
        rows = _world_comparisons(cfg, split)
    elif compared and cfg.data.format not in COMPARISON_FORMATS:
        rows = []
    else:
        rows, held_out = _read(cfg, split, "comparisons", errors)
    rows, left_out = _targets(cfg, rows, split)
    if cfg.reward_model.binarize:
        rows = [half for row in rows for half in _binarized(row)]
    table, too_long = tokenization.tokenize_comparisons(tokenizer, rows, max_length)
    if compared:
        collected, longer = _collected(cfg, compared, max_length)
        table, too_long = pa.concat_tables([table, compare.comparisons_of(collected)]), too_long + longer
    if label_noise:
        table, left_out["flipped"] = flip_labels(table, label_noise, cfg.seed)
    _check_rows(table, f"comparisons within max_length={max_length}", too_long)
    return table.combine_chunks(), _report(table, errors, too_long, held_out) | left_out


def load_rankings(
    cfg: Config, tokenizer_dir: str, split: Split, max_length: int, compared: Sequence[str] = ()
) -> tuple[pa.Table, Report]:
    """Rankings of at most ``max_length`` tokens a response, as ``schema.RANKING``; of the world as many as make
    ``data.world.comparisons`` pairs. Arguments and labels as in :func:`load_comparisons`.

    Raises:
        ValueError: the format holds none; or the world is asked for held-out ones: it has comparisons for that.
    """
    errors, held_out = RowErrors(cfg.data.on_bad_row), 0
    tokenizer = tokenization.load_tokenizer(tokenizer_dir)
    if cfg.data.format == "world":
        if split == "test":
            raise ValueError("data.format=world has no held-out rankings: a reward model is tested on comparisons")
        rows = _world_rankings(cfg)
    else:
        rows, held_out = _read(cfg, split, "rankings", errors)
    rows, left_out = _targets(cfg, rows, split)
    table, too_long = tokenization.tokenize_rankings(tokenizer, rows, max_length)
    if compared:
        collected, longer = _collected(cfg, compared, max_length)
        table, too_long = pa.concat_tables([table, collected.select(table.column_names)]), too_long + longer
    _check_rows(table, f"rankings within max_length={max_length}", too_long)
    return table.combine_chunks(), _report(table, errors, too_long, held_out) | left_out


def _collected(cfg: Config, folders: Sequence[str], max_length: int) -> tuple[pa.Table, int]:
    """``schema.RANKING`` with ``source``: prompts of which a pair is to be learned; and how many were too long."""
    rm = cfg.reward_model
    table = pa.concat_tables([compare.read(Path(folder)) for folder in folders])
    aims = [labels.targets(p, rm.ties, rm.labels) for p in table["preferences"].to_pylist()]
    column = pa.array(aims, pa.list_(pa.float32()))
    table = table.set_column(table.column_names.index("preferences"), "preferences", column)
    learned = np.array([not np.isnan(aim).all() for aim in aims], bool)
    longest = zip(table["prompt_ids"].to_pylist(), table["responses"].to_pylist(), strict=True)
    fits = np.array([len(prompt) + max(map(len, responses)) <= max_length for prompt, responses in longest], bool)
    return table.filter(pa.array(learned & fits)), int((learned & ~fits).sum())


def _targets(cfg: Config, rows: Sequence[Example], split: Split) -> tuple[list[Example], dict[str, int]]:
    """Rows whose ``preferences`` are what is to be learned, or predicted (test split), as far as they have a pair."""
    rm = cfg.reward_model
    ties, kind = (rm.ties, rm.labels) if split == "train" else ("drop", "share")
    aims = [labels.targets(row.preferences, ties, kind) for row in rows]
    kept = [replace(row, preferences=aim) for row, aim in zip(rows, aims, strict=True) if not np.isnan(aim).all()]
    if rows and not kept:
        raise ValueError(f"none of {len(rows)} prompts has two responses of which one is better ({split} split)")
    tied = sum(row.preferences.count(0.5) for row in rows) if ties == "drop" else 0
    return kept, {"tied": tied, "no_pair": len(rows) - len(kept)}


def _binarized(row: Example) -> Iterator[Example]:
    """Two comparisons of each pair A > B: GOOD: A > BAD: A, and BAD: B > GOOD: B (Askell et al., 2112.00861, 4.1)."""
    for better, worse, share in labels.compared(row.responses, row.preferences):
        yield replace(row, responses=(f"GOOD: {better.strip()}", f"BAD: {better.strip()}"), preferences=(share,))
        yield replace(row, responses=(f"BAD: {worse.strip()}", f"GOOD: {worse.strip()}"), preferences=(share,))


def _read(cfg: Config, split: Split, purpose: Purpose, errors: RowErrors) -> tuple[list[Example], int]:
    """Examples of one split, and how many training rows were left out because they are held out."""
    formats.check_purpose(cfg.data.format, purpose)
    if split == "test" and cfg.data.test is not None:
        return _read_file(cfg, cfg.data.test, "test", purpose, errors), 0
    if cfg.data.train is None:
        raise ValueError(f"data.train is not given, but the run needs {purpose} (split {split})")
    rows = _read_file(cfg, cfg.data.train, "train", purpose, errors)
    if cfg.data.test is None:
        kept = [row for row in rows if _by_hash(row) == (split == "test")]
        return (_part(cfg, kept), len(rows) - len(kept)) if split == "train" else (kept, 0)
    test = _read_file(cfg, cfg.data.test, "test", "prompts", RowErrors(cfg.data.on_bad_row))
    held_out = {_prompt_key(row) for row in test}
    kept = [row for row in rows if _prompt_key(row) not in held_out]
    return _part(cfg, kept), len(rows) - len(kept)


def _part(cfg: Config, rows: list[Example]) -> list[Example]:
    """``data.part`` of training rows, chosen by a hash of the prompt."""
    if cfg.data.part is None:
        return rows
    number, of = map(int, cfg.data.part.split("/"))
    return [row for row in rows if zlib.crc32(f"part {_prompt_key(row)}".encode()) % of == number - 1]


def _read_file(cfg: Config, name: str, split: Split, purpose: Purpose, errors: RowErrors) -> list[Example]:
    return _parsed(cfg, name, split, lambda row: formats.parse(cfg.data.format, row, purpose), errors)


def _parsed(
    cfg: Config, name: str, split: Split, parse: Callable[[dict[str, Any]], list[Example]], errors: RowErrors
) -> list[Example]:
    folder = cfg.data.dir or ""
    if name.startswith("hub:"):
        path = name
    else:
        path = folder if folder.startswith("hub:") else str(Path(folder) / name)
    rows = list(errors.parsed(read_rows(path, errors, cfg.data.max_rows, hub_split=split), parse))
    if not rows:
        first = f"; the first of {errors.count} faulty rows: {errors.messages[0]}" if errors.messages else ""
        raise ValueError(f"{path} has no usable row for data.format={cfg.data.format}{first}")
    return rows


def _prompt_key(row: Example) -> str:
    return row.text if row.text is not None else json.dumps(row.messages)


def _by_hash(row: Example) -> bool:
    return zlib.crc32(_prompt_key(row).encode()) % HELD_OUT_ONE_IN == 0


def _check_rows(table: pa.Table, what: str, too_long: int) -> None:
    if table.num_rows == 0:
        raise ValueError(f"no {what}; {too_long} rows are longer. Raise the limit, or check the data")


def _report(table: pa.Table, errors: RowErrors, too_long: int, held_out: int) -> Report:
    return {
        "rows": table.num_rows,
        "too_long": too_long,
        "held_out": held_out,
        **_fault_report(errors),
    }


def _fault_report(errors: RowErrors) -> Report:
    return {"skipped": errors.count, "faults": dict(errors.faults.most_common()), "messages": errors.messages}


def _world_prompts(cfg: Config, split: Split) -> list[dict[str, Any]]:
    n = cfg.data.world.prompts if split == "train" else cfg.data.world.test_prompts
    return world.make_prompts(cfg.seed, n, split)


def _world_example(row: dict[str, Any]) -> Example:
    compared = (row["chosen"], row["rejected"]) if "chosen" in row else row.get("responses", ())
    return Example(
        messages=[{"role": "user", "content": row["prompt"]}],
        response=row.get("chosen", row.get("response")),
        responses=tuple(compared),
        preferences=(1.0,) if "chosen" in row else row.get("preferences", ()),
        source=row.get("source", ""),
        fields={key: row[key] for key in ("family", "kind", "answer") if key in row},
    )


def _world_comparisons(cfg: Config, split: Split) -> list[Example]:
    settings = cfg.data.world
    if split == "test":
        rows = world.make_test_comparisons(cfg.seed, 2 * settings.test_prompts)
    else:
        rows = world.make_comparisons(cfg.seed, settings.comparisons, settings.label_noise)
    return [_world_example(row) for row in rows]


def _world_rankings(cfg: Config) -> list[Example]:
    settings = cfg.data.world
    k = settings.ranked_responses
    wanted = settings.comparisons // (k * (k - 1) // 2)
    return [_world_example(row) for row in world.make_rankings(cfg.seed, wanted, k, settings.label_noise)]
