"""Medians, files and comparisons that the benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RUNS = [
    {"kind": "ours", "repetition": 0, "seconds": 1.0, "copies": 4},
    {"kind": "ours", "repetition": 1, "seconds": 9.0, "copies": None},
    {"kind": "ours", "repetition": 2, "seconds": 2.0},
    {"kind": "theirs", "repetition": 0, "seconds": 8.0},
]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.results import Report

    return Report("example", case=("kind",), figures=("seconds", "copies"))


def options(report: Any, *arguments: str) -> Any:
    return report.parser("An example.", repetitions=3).parse_args(arguments)


def test_medians_are_those_of_the_runs_that_have_the_figure(report: Any) -> None:
    assert report.medians(RUNS) == {("ours",): {"seconds": 2.0, "copies": 4}, ("theirs",): {"seconds": 8.0}}


def test_ratios_are_those_within_a_repetition(report: Any) -> None:
    kinds = [("ours", 0, 2.0), ("theirs", 0, 1.0), ("ours", 1, 30.0), ("theirs", 1, 10.0), ("ours", 2, 7.0)]
    runs = [{"kind": kind, "repetition": i, "seconds": x} for kind, i, x in kinds]
    assert report.paired(runs, "seconds", "ours", "theirs") == {(): 2.5}, "2 and 3; the last one has no partner"
    assert report.paired(runs, "seconds", "ours", "nobody's") == {}


def test_runs_are_written_and_compared_with_those_before(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "example.json"
    chosen = options(report, "--out", str(file))
    report.finish(RUNS, {"length": 5}, chosen)
    assert "no JSON to compare with" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["runs"], written["settings"]) == (RUNS, {"length": 5})
    assert {"torch", "vllm", "ray"} <= written["versions"].keys()
    assert report.read(chosen) == RUNS

    report.finish([run | {"seconds": run["seconds"] * 3} for run in RUNS], {}, chosen)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows[-2:]] == [["ours", "3.00", "1.00"], ["theirs", "3.00", "–"]]


def test_another_machine_is_not_compared_with(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "example.json"
    chosen = options(report, "--out", str(file))
    report.finish(RUNS, {}, chosen)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": {"cpu": "Z80"}}))
    capsys.readouterr()
    report.finish(RUNS, {}, chosen)
    out = capsys.readouterr().out
    assert "not compared" in out
    assert "Z80" in out
    assert "over the figures before" not in out


def test_small_runs_leave_the_json_alone(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.results.FOLDER", tmp_path)
    report.finish(RUNS, {}, options(report, "--small"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"measure first: python -m benchmarks\.example"):
        report.read(options(report, "--table"))


def test_the_tables_of_the_page_are_those_of_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import page

    text = page.PAGE.read_text()
    assert "<!-- table: learning -->" in text
    assert page.filled(text) == text, "run python -m benchmarks.page"
    emptied = page.MARKED.sub(r"\g<begin>\g<end>", text)
    assert len(emptied) < len(text)
    assert page.filled(emptied) == text
    with pytest.raises(ValueError, match=r"there is no nonsense\.json"):
        page.filled("<!-- table: nonsense -->\n<!-- end -->")


def test_a_table_has_the_medians_of_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import page

    monkeypatch.setattr(page, "FOLDER", tmp_path)
    runs = [
        {"process": "driver", "part": "connect", "begins": 0.5, "seconds": 1234.4},
        {"process": "driver", "part": "connect", "begins": 0.5, "seconds": 2.0},
        {"process": "driver", "part": "connect", "begins": 0.12345, "seconds": 9999.0},
        {"process": "policy 0", "part": "import", "begins": 3},
    ]
    (tmp_path / "startup.json").write_text(json.dumps({"runs": runs}))
    assert page.filled("a\n<!-- table: startup -->\nold\n<!-- end -->\nb").splitlines() == [
        "a",
        "<!-- table: startup -->",
        "| process | part | begins | seconds |",
        "|---|---|---|---|",
        "| driver | connect | 0.5 | 1,234 |",
        "| policy 0 | import | 3 |  |",
        "<!-- end -->",
        "b",
    ]
