"""``report.html``: one self-contained page about a run, without scripts and without anything from the network.

Read from the run folder, each part left out where its file is not there:

* ``summary.json``   tiles and the table of all figures; ``eval.STAGE.by_group.GROUP.METRIC`` makes the table by group,
                     ``STAGE.calibration`` the plot of a reward model
  ``overoptimization.NAME.turn`` marks where a figure turned
* ``metrics.jsonl``  curves of every stage (:mod:`rlhf_dist.observability.metrics`); of evaluations also over √KL
* ``samples.json``   ``[{"prompt", "before", "after", "score_before", "score_after"}, ...]``, side by side
* ``config.yaml``    shown as it is
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rlhf_dist.observability.charts import calibration_chart, chart
from rlhf_dist.observability.files import write_atomically
from rlhf_dist.observability.formats import duration, human, printable
from rlhf_dist.observability.metrics import RESERVED, read_metrics

# Title, unit, metrics that share its axis: names, or prefixes that end in "/". A metric is drawn in the first that
# takes it; what none takes gets a chart of its own below the others.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Reward", "", ("rollout/reward_mean", "rollout/score_mean")),
    ("Gold score", "", ("eval/gold_score", "eval/gold_score_greedy")),
    ("KL to the reference", "nats", ("train/kl", "rollout/kl")),
    ("Loss", "", ("train/loss", "eval/loss")),
    ("Policy loss", "", ("train/policy_loss",)),
    ("Value loss", "", ("train/value_loss",)),
    ("Accuracy", "", ("train/accuracy", "eval/accuracy")),
    ("Entropy", "nats", ("train/entropy",)),
    ("Response length", "tokens", ("rollout/response_length_mean",)),
    ("Time per step", "s", ("timing/",)),
    ("Throughput", "tokens/s", ("perf/throughput",)),
)

# Key of the summary and its label; the first that exist become tiles.
TILES: tuple[tuple[str, str], ...] = (
    ("eval.sft.gold_score", "gold score, SFT"),
    ("eval.ppo.gold_score", "gold score, PPO"),
    ("eval.sft.reward", "reward, SFT"),
    ("eval.ppo.reward", "reward, PPO"),
    ("eval.ppo.kl", "KL to the reference"),
    ("reward_model.accuracy", "reward-model accuracy"),
    ("weight_sync.max_canary_diff", "largest weight-sync difference"),
    ("steps", "steps"),
    ("rows_skipped", "rows skipped"),
)

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1c2430;--dim:#5d6878;--line:#dde2e9;--good:#1a7f4b;
--bad:#b3261e;--s0:#2563c9;--s1:#c2571a;--s2:#1b8a6b;--s3:#a03b8c;--s4:#8a6d00;--s5:#5b6470}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1b212a;--text:#e6eaf0;--dim:#98a3b3;--line:#2f3844;
--good:#4cc38a;--bad:#ff8a80;--s0:#6ea8ff;--s1:#ff9e5e;--s2:#4fd1a9;--s3:#e58ad3;--s4:#e3c14a;--s5:#aab4c2}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 24px 60px;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:36px 0 12px}.dim{color:var(--dim)}p{margin:4px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(350px,100%),1fr))}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));margin-top:20px}
.tile b{display:block;font-size:24px;font-weight:600;line-height:1.3}.tile span{color:var(--dim);font-size:13px}
.finished{color:var(--good)}.failed,.interrupted{color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--dim);font-weight:500;font-size:13px}td.n,th.n{text-align:right}
pre,.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 0;font:13px/1.45 ui-monospace,Menlo,Consolas,
"DejaVu Sans Mono",monospace}
.sample{margin-bottom:14px}.two{display:grid;gap:18px;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));
margin-top:10px;border-top:1px solid var(--line);padding-top:10px}
summary{cursor:pointer;color:var(--dim);margin:14px 0 8px}.error{border-color:var(--bad);margin-top:16px}
figure{margin:0}figcaption{font-weight:600;font-size:14px}svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{fill:var(--dim);font-size:11px}.g{stroke:var(--line);stroke-width:1}
.m{stroke:var(--dim);stroke-dasharray:4 3}.l{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke-width:1;opacity:.35}
.h{fill:transparent;stroke:none}.h:hover{fill:var(--dim)}
.b{stroke:var(--s0);stroke-width:8;opacity:.2}.p{fill:var(--s0)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--dim);margin-top:6px}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into ``run_dir`` from what lies there, and return its path.

    Raises:
        ValueError: ``run_dir`` is no folder, or one of its JSON files cannot be read.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is no run folder: give a folder with metrics.jsonl or summary.json")
    summary = _read_json(run_dir / "summary.json", {})
    config = run_dir / "config.yaml"
    parts = [
        _head(run_dir.resolve().name, summary),
        _by_group(summary.get("eval", {})),
        _reward_models(calibrations(summary)),
        _samples(_read_json(run_dir / "samples.json", [])),
        *_stages(read_metrics(run_dir / "metrics.jsonl"), summary.get("overoptimization", {})),
        _all_figures(summary),
        _details("Configuration", f"<pre>{escape(config.read_text('utf-8'))}</pre>" if config.exists() else ""),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run_dir.resolve().name)}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(part for part in parts if part)
        + "</body></html>\n"
    )
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); delete it to make the report without it") from error
    if type(content) is not type(default):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a {type(default).__name__}")
    return content


def _head(name: str, summary: Mapping[str, Any]) -> str:
    status = str(summary.get("status", "unknown"))
    facts = [f'<b class="{escape(status)}">{escape(status)}</b>']
    facts += [escape(str(summary[key])) for key in ("recipe", "started") if key in summary]
    if isinstance(summary.get("seconds"), int | float):
        facts.append(f"{duration(summary['seconds'])} elapsed")
    html = f"<h1>{escape(name)}</h1><p>{' &middot; '.join(facts)}</p>"
    if summary.get("description"):
        html += f'<p class="dim">{escape(str(summary["description"]))}</p>'
    if summary.get("error"):
        html += f'<div class="card error"><b>Error</b><pre>{escape(str(summary["error"]))}</pre></div>'
    figures = dict(_flat(summary))
    tiles = [
        f'<div class="card tile"><b>{escape(human(figures[key]))}</b><span>{escape(label)}</span></div>'
        for key, label in TILES
        if figures.get(key) is not None
    ]
    return html + (f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "")


def _by_group(evaluations: Any) -> str:
    """One row per group; one column per evaluated stage and metric."""
    rows: dict[str, dict[str, Any]] = {}
    columns: dict[str, None] = {}
    for stage, result in evaluations.items() if isinstance(evaluations, dict) else ():
        for group, metrics in (result.get("by_group", {}) if isinstance(result, dict) else {}).items():
            for metric, value in metrics.items():
                column = f"{stage} {metric}"
                columns[column] = None
                rows.setdefault(group, {})[column] = value
    if not rows:
        return ""
    head = "<th>group</th>" + "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
    body = "".join(
        f"<tr><td>{escape(group)}</td>"
        + "".join(f'<td class="n">{escape(human(row.get(column)))}</td>' for column in columns)
        + "</tr>"
        for group, row in rows.items()
    )
    return f'<h2>By group</h2><div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'


def calibrations(summary: Mapping[str, Any]) -> list[str]:
    """A chart of every reward model that was judged."""
    figures = []
    for stage, judged in summary.items():
        if isinstance(judged, dict) and (curve := judged.get("calibration")):
            note = f"{stage}: expected calibration error {human(judged['calibration_error'])}, {judged['pairs']} pairs"
            title = "Predicted and observed win probability"
            figures.append(calibration_chart(title, note, curve["predicted"], curve["observed"], curve["sides"]))
    return figures


def _reward_models(figures: list[str]) -> str:
    return f'<h2>Reward models on held-out pairs</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _samples(samples: list[dict[str, Any]]) -> str:
    cards = []
    for sample in samples:
        sides = []
        for side in ("before", "after"):
            if side in sample:
                score = sample.get(f"score_{side}")
                label = side if score is None else f"{side}, score {human(score)}"
                sides.append(
                    f'<div><span class="dim">{escape(label)}</span>'
                    f'<div class="text">{escape(printable(str(sample[side])))}</div></div>'
                )
        prompt = (
            f'<span class="dim">prompt</span><div class="text">{escape(printable(str(sample.get("prompt", ""))))}</div>'
        )
        cards.append(f'<div class="card sample">{prompt}<div class="two">{"".join(sides)}</div></div>')
    return f"<h2>Samples before and after</h2>{''.join(cards)}" if cards else ""


def _stages(records: list[dict[str, Any]], overoptimization: Mapping[str, Any]) -> Iterator[str]:
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        stages.setdefault(str(record["stage"]), []).append(record)
    for stage, rows in stages.items():
        names = dict.fromkeys(name for row in rows for name in row if name not in RESERVED)
        main = [against_kl(rows, overoptimization)]
        for title, unit, wanted in CHARTS:
            members = [n for n in names if any(n == w or (w.endswith("/") and n.startswith(w)) for w in wanted)]
            for name in members:
                del names[name]
            main.append(chart(title, unit, {n: _series(rows, n) for n in members}))
        rest = "".join(chart(name, "", {name: _series(rows, name)}) for name in names)
        yield f'<h2>{escape(stage)}</h2><div class="grid">{"".join(main)}</div>'
        yield _details(f"More figures of {stage}", f'<div class="grid">{rest}</div>' if rest else "")


def against_kl(rows: list[dict[str, Any]], overoptimization: Mapping[str, Any]) -> str:
    """Proxy and gold of three evaluations or more against √KL, each as its change since the first one, in standard
    deviations of the samples then; marked is where a figure other than the proxy turned."""
    rows = sorted((r for r in rows if isinstance(r.get("eval/sqrt_kl"), int | float)), key=lambda r: r["step"])
    if len(rows) < 3:
        return ""
    series: dict[str, list[tuple[float, float | None]]] = {}
    turns: dict[str, float] = {}
    for name in (key.removesuffix("_std") for key in rows[0] if key.endswith("_std")):
        start, scale = rows[0][name], rows[0][f"{name}_std"]
        if not scale:  # all samples had the same
            continue
        label = name.removeprefix("eval/")
        shown = [(r["eval/sqrt_kl"], r.get(name)) for r in rows]
        series[label] = [(x, None if y is None else (y - start) / scale) for x, y in shown]
        turn = overoptimization.get(label, {}).get("turn")
        if turn and label != "reward":
            turns[f"{label} turns"] = turn["sqrt_kl"]
    return chart("Over-optimisation", "change, in standard deviations at the start", series, "√KL", turns)


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """Points (step, value); None breaks the line. Steps without the metric do not: evaluations are rare."""
    points = ((row["step"], row[name]) for row in rows if name in row)
    return sorted((float(step), float(y) if isinstance(y, int | float) else None) for step, y in points)


def _all_figures(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape('-' if value is None else str(value))}</td></tr>"
        for key, value in _flat(summary)
    )
    return _details("All figures and versions", f'<div class="card scroll"><table>{rows}</table></div>' if rows else "")


def _details(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>" if html else ""


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
