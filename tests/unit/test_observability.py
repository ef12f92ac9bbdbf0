"""Metrics, terminal, trace, logs, summary and report: what is written is complete, valid, and safe to open."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from heads import free_ports

from rlhf_dist.observability import terminal as terminal_module
from rlhf_dist.observability.charts import calibration_chart, chart, ticks
from rlhf_dist.observability.formats import duration, human, printable
from rlhf_dist.observability.logs import tail
from rlhf_dist.observability.metrics import MetricsWriter, prometheus_name, read_metrics
from rlhf_dist.observability.report import write_report
from rlhf_dist.observability.summary import Summary, git_commit
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.observability.trace import Trace

# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.123456, "0.123"),
        (3e-6, "3e-06"),
        (999.4, "999"),
        (999.6, "1k"),
        (12345, "12.3k"),
        (999_600, "1M"),
        (-1_234_567, "-1.23M"),
        (2.5e9, "2.5G"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "-"),
        (False, "no"),
        ("6/8", "6/8"),
    ],
)
def test_human(value: object, shown: str) -> None:
    assert human(value) == shown


def test_human_never_fails_on_huge_numbers() -> None:
    assert human(1e300) == "1e+300"


def test_duration() -> None:
    assert [duration(s) for s in (-1, 4.4, 59.6, 3725)] == ["0:00", "0:04", "1:00", "1:02:05"]


def test_printable_keeps_text_and_shows_control_characters() -> None:
    assert printable("ü 漢字\t\n😀") == "ü 漢字\t\n😀"
    assert printable("\x1b[2J\r\x9b\u202e\ud800") == r"\x1b[2J\r\x9b\u202e\ud800"


# ---------------------------------------------------------------- metrics


def test_metrics_lines_and_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.log(1, "ppo", {"rollout/reward_mean": 0.5, "train/kl": math.nan, "train/grad_norm": math.inf})
        line = path.read_text()  # flushed before close
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(record)[:4] == ["step", "stage", "time", "rollout/reward_mean"]
    assert abs(record["time"] - time.time()) < 60
    assert record["train/kl"] is None
    assert record["nonfinite"] == {"train/kl": "nan", "train/grad_norm": "inf"}


def test_metrics_resume_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.log(1, "ppo", {"a": 1})
        writer.log(2, "ppo", {"a": 2})
    with open(path, "a") as file:
        file.write('{"step": 3, "sta')
    with MetricsWriter(path) as writer:
        writer.log(2, "ppo", {"a": 20})
        writer.log(3, "ppo", {"a": 30})
    assert [(r["step"], r["a"]) for r in read_metrics(path)] == [(1, 1), (2, 20), (3, 30)]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(("name", "value"), [("step", 1), ("train/x", "high"), ("train/x", None)])
def test_metrics_refuse(tmp_path: Path, name: str, value: object) -> None:
    with (
        MetricsWriter(tmp_path / "m.jsonl") as writer,
        pytest.raises(ValueError, match=f"metric '{name}'"),
    ):
        writer.log(1, "ppo", {name: value})  # type: ignore[dict-item]
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_prometheus_endpoint(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    with MetricsWriter(tmp_path / "m.jsonl", port) as writer:
        writer.log(7, "sft", {"train/loss": 1.0})
        writer.log(1, "ppo", {"rollout/reward_mean": 0.25, "timing/generate": 1.5, "train/kl": math.nan})
        writer.log(2, "ppo", {"rollout/reward_mean": 0.5, "score/a-b": 1.0, "score/a_b": 2.0})
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples['rlhf_rollout_reward_mean{stage="ppo"}']) == 0.5
    assert float(samples['rlhf_timing_generate_seconds{stage="ppo"}']) == 1.5
    assert samples['rlhf_train_kl{stage="ppo"}'] == "NaN"
    assert float(samples['rlhf_steps_total{stage="ppo"}']) == 2
    assert float(samples['rlhf_step{stage="sft"}']) == 7
    assert float(samples['rlhf_score_a_b{stage="ppo"}']) == 1
    assert float(samples['rlhf_score_a_b_2{stage="ppo"}']) == 2
    MetricsWriter(tmp_path / "m.jsonl", port).close()  # the port is free again


def test_prometheus_port_clash_and_wrong_host(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    with MetricsWriter(tmp_path / "a.jsonl", port), pytest.raises(ValueError, match=rf"run\.prometheus_port={port}"):
        MetricsWriter(tmp_path / "b.jsonl", port)
    with pytest.raises(ValueError, match=r"run\.prometheus_host='192\.0\.2\.1'"):
        MetricsWriter(tmp_path / "c.jsonl", port, "192.0.2.1")


def test_prometheus_names() -> None:
    assert prometheus_name("rollout/response_length_mean") == "rlhf_rollout_response_length_mean_tokens"
    assert prometheus_name("perf/throughput") == "rlhf_perf_throughput_tokens_per_second"
    assert prometheus_name("eval/gold score") == "rlhf_eval_gold_score"
    assert prometheus_name("timing/wait_seconds") == "rlhf_timing_wait_seconds"


# ---------------------------------------------------------------- terminal


def say_everything(terminal: Terminal) -> None:
    terminal.title("title [bold]x[/bold]")
    terminal.info("see [/] and [red]this[/red] \x1b[31m")
    terminal.warn("careful")
    terminal.error("broken")
    terminal.finding("fault", "ports [x]", "a\n  does \x1b[31m not reach [red]b[/red]")
    with terminal.starting({"generator": 1, "policy [0]": 2}) as starting:
        starting.ready("generator")
        starting.ready("policy [0]", 2)
    with terminal.stage("SFT [x]", total=40) as bar:
        for step in range(1, 41):
            bar.update(step, {"loss [l]": 1.25, "tokens/s": 12000})
    with terminal.stage("loading") as bar:
        bar.update(3)
    terminal.table("by [family]", ["family", "gold"], [["[b]ünï 漢字", 0.51234], ["x" * 300, None]])
    terminal.samples("samples", [{"prompt": "[red]hi[/]", "response": "\x00\x1b[2J\ud800 " + "w " * 900, "score": 0.5}])


def test_terminal_in_a_pipe_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    say_everything(Terminal(out))
    text = out.getvalue()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    for shown in ("[bold]x[/bold]", "[/] and [red]this[/red]", r"\x1b[31m", "by [family]", "[b]ünï 漢字", "[red]hi[/]"):
        assert shown in text
    assert "warning: careful" in text
    assert "error: broken" in text
    assert r"fault    ports [x]: a does \x1b[31m not reach [red]b[/red]" in text.splitlines()
    assert "generator: ready after 0:00" in text
    assert "policy [0]: ready" in text
    progress = [line for line in text.splitlines() if line.startswith("SFT [x]: ") and "%" in line]
    assert [line.split()[2] for line in progress] == [str(p) for p in range(10, 101, 10)]
    assert "step 4/40 | loss [l] 1.25  tokens/s 12k |" in progress[0]
    assert "left" in progress[0]
    assert "loading: step 3" in text
    assert "more characters)" in text


def test_terminal_writes_after_15_seconds_without_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_module, "PLAIN_INTERVAL", 0.05)
    out = io.StringIO()
    with Terminal(out).stage("slow", total=1000) as bar:
        bar.update(1)
        time.sleep(0.06)
        bar.update(2)
        bar.update(3)
    shown = [line for line in out.getvalue().splitlines() if "%" in line]
    assert [re.findall(r"step (\d+)/", line)[0] for line in shown] == ["2", "3"]  # due, and the last one


def test_terminal_says_where_a_stage_stopped() -> None:
    out = io.StringIO()
    terminal = Terminal(out)

    def interrupted_stage() -> None:
        with terminal.stage("PPO", total=9) as bar:
            bar.update(2)
            raise KeyboardInterrupt

    def failed_start() -> None:
        with terminal.starting({"policy": 2, "critic": 1}) as starting:
            starting.ready("critic")
            starting.ready("policy")
            raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        interrupted_stage()
    with pytest.raises(RuntimeError):
        failed_start()
    assert "PPO: stopped by KeyboardInterrupt at step 2" in out.getvalue()
    assert "not ready: policy 1/2\n" in out.getvalue()


def test_starting_refuses_an_unknown_group() -> None:
    with (
        pytest.raises(ValueError, match=r"'ciritc'.*generator, critic"),
        Terminal(io.StringIO()).starting({"generator": 1, "critic": 1}) as starting,
    ):
        starting.ready("ciritc")


@pytest.mark.parametrize(("width", "encoding"), [(12, "utf-8"), (40, "ascii"), (120, "utf-8")])
def test_terminal_on_a_tty(monkeypatch: pytest.MonkeyPatch, width: int, encoding: str) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    ours, theirs = pty.openpty()
    received = bytearray()

    def read() -> None:
        while not received.endswith(b"END"):
            received.extend(os.read(ours, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding=encoding) as file:
        terminal = Terminal(file)
        assert terminal.live
        say_everything(terminal)
        file.write("END")
        file.flush()
        reader.join(timeout=10)
    os.close(ours)
    assert b"\x1b[2J" not in received  # the sample's, which would clear the screen
    assert received.count(b"\x1b[?25h") == received.count(b"\x1b[?25l") > 0  # the cursor is back after every bar
    if width == 120:
        assert re.search(r"SFT \[x\].*100 %.*loss \[l\] 1\.25", received.decode())


def test_time_left_is_that_of_the_recent_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now)
    with Terminal(io.StringIO()).stage("x", total=200, start=50) as bar:
        assert bar.times == "0:00 elapsed"
        now = 100.0  # a slow first step after a restart
        bar.update(51)
        for step in range(52, 101):
            now += 2
            bar.update(step)
        assert bar.times == "3:18 elapsed, 3:20 left"
        now += 5
        assert bar.times == "3:23 elapsed, 3:15 left"


# ---------------------------------------------------------------- trace


def test_trace_spans_of_several_processes(tmp_path: Path) -> None:
    driver, actor = Trace(), Trace()
    with driver.span("driver", "step", step=1), driver.span("driver", "update"):
        time.sleep(0.02)
    with pytest.raises(KeyError), actor.span("generator 0", "generate"):
        raise KeyError
    driver.add(actor.drain())
    assert actor.drain() == []
    assert actor.left_out == 0
    driver.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {e["name"]: e for e in events if e["ph"] == "X"}
    rows = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert rows == {1: "driver", 2: "generator 0"}
    assert rows[spans["generate"]["pid"]] == "generator 0"
    assert spans["generate"]["args"] == {"error": "KeyError"}
    assert spans["step"]["ts"] == 0
    assert spans["step"]["args"] == {"step": 1}
    assert 2e4 <= spans["update"]["dur"] <= spans["step"]["dur"]
    assert spans["step"]["tid"] == spans["update"]["tid"]  # nested: one lane


def test_trace_puts_overlapping_spans_into_lanes(tmp_path: Path) -> None:
    trace = Trace()
    times = {"a": (0, 10), "b": (5, 15), "c": (11, 14), "d": (16, 20), "inside b": (6, 9)}
    trace.add(
        {"name": n, "process": "p", "start": float(s), "end": float(e), "args": {}} for n, (s, e) in times.items()
    )
    trace.write(tmp_path / "t.json")
    lane = {e["name"]: e["tid"] for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "X"}
    assert lane == {"a": 0, "b": 1, "inside b": 0, "c": 0, "d": 0}


def test_trace_is_bounded_and_says_so(tmp_path: Path) -> None:
    trace = Trace(max_events=3)
    for i in range(10):
        with trace.span("p", f"s{i}", loss=math.nan):
            pass
    trace.write(tmp_path / "t.json")
    written = json.loads((tmp_path / "t.json").read_text())
    assert [e["name"] for e in written["traceEvents"] if e["ph"] == "X"] == ["s7", "s8", "s9"]
    assert written["otherData"]["spans_left_out"] == 7
    assert "7 earlier spans left out" in (tmp_path / "t.json").read_text()
    Trace().write(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text())["traceEvents"] == []


# ---------------------------------------------------------------- logs


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)


def test_quiet_libraries(tmp_path: Path) -> None:
    # The real library, which installs a terminal handler when its logging is first used.
    result = run_python(f"""
import logging, warnings
from rlhf_dist.observability.logs import quiet_libraries
quiet_libraries({str(tmp_path / "early.log")!r})
quiet_libraries({str(tmp_path / "lib.log")!r})
warnings.warn("from warnings")
from transformers.utils import logging as theirs
theirs.get_logger("transformers.x").warning("from transformers")
logging.getLogger("ray").addHandler(logging.StreamHandler())
for name in ("ray.data", "vllm.engine", "urllib3"):
    logging.getLogger(name).warning("from " + name)
print("the user's own line")
""")
    assert result.stdout == "the user's own line\n"
    assert result.stderr == ""
    log = (tmp_path / "lib.log").read_text()
    for source in ("warnings", "transformers", "ray.data", "vllm.engine", "urllib3"):
        assert log.count(f"from {source}\n") == 1
    assert "WARNING ray.data: from ray.data" in log
    assert (tmp_path / "early.log").read_text() == ""


def test_redirect_output_takes_descriptors_and_children(tmp_path: Path) -> None:
    path = tmp_path / "actor.log"
    path.write_text("before\n")
    result = run_python(f"""
import logging, os, sys
from rlhf_dist.observability.logs import redirect_output
logging.basicConfig()
redirect_output({str(path)!r})
print("printed \\ud800")
os.write(2, b"from C\\n")
os.system("echo child")
logging.warning("logged")
os._exit(0)
""")
    assert result.stdout == result.stderr == ""
    lines = path.read_text().splitlines()
    assert lines == ["before", "printed \\ud800", "from C", "child", "WARNING:root:logged"]


def test_tail(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"line {i} " + "ü" * (i % 50) for i in range(3000)]
    path.write_text("\n".join(lines) + "\n")
    assert tail(path, 500) == lines[-500:]
    assert tail(path, 99999) == lines
    path.write_text("a\nb")
    assert tail(path, 1) == ["b"]
    assert tail(path, 0) == []
    assert tail(tmp_path / "none", 5) == []


# ---------------------------------------------------------------- summary


def test_summary(tmp_path: Path) -> None:
    summary = Summary()
    summary.set("eval.ppo.gold_score", 0.9)
    summary.set("eval.ppo.kl", math.nan)
    summary.set("eval.ppo.by_group", {"sort": {"gold_score": math.inf}})
    assert summary.data["status"] == "running"
    summary.finish("failed", "out of memory")
    summary.write(tmp_path / "summary.json")
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written["status"] == "failed"
    assert written["error"] == "out of memory"
    assert written["eval"]["ppo"] == {"gold_score": 0.9, "kl": None, "by_group": {"sort": {"gold_score": None}}}
    assert {"python", "rlhf_dist", "ray", "torch", "vllm", "deepspeed", "pyarrow"} <= set(written["versions"])
    assert written["host"]["cpus"] == os.cpu_count()
    assert summary.get("eval.ppo.gold_score") == 0.9
    assert summary.get("eval.sft.gold_score", -1) == -1
    assert os.listdir(tmp_path) == ["summary.json"]


def test_summary_refuses_what_json_cannot_hold() -> None:
    summary = Summary()
    summary.set("a.b", 1)
    with pytest.raises(ValueError, match=r"'a\.b\.c'.*'a\.b' already holds 1"):
        summary.set("a.b.c", 2)
    with pytest.raises(ValueError, match=r"'x\.y'\.z\[1\] is a set"):
        summary.set("x.y", {"z": [1, {2}]})


def test_summary_does_not_import_what_it_looks_up() -> None:
    code = "import sys; from rlhf_dist.observability.summary import Summary; Summary()"
    loaded = run_python(f"{code}; print([m for m in ('torch', 'ray', 'vllm', 'deepspeed') if m in sys.modules])")
    assert loaded.stdout == "[]\n"


def test_summary_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = Summary()
    summary.set("big", list(range(5000)))
    summary.write(path)
    stop = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(json.loads(path.read_text())["status"])

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        summary.write(path)
    stop.set()
    reader.join()
    assert len(seen) > 5
    assert set(seen) == {"running"}


def test_git_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "x")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


# ---------------------------------------------------------------- report

EVIL = "<script>alert('x')</script>\x1b\ud800 & \"quotes\""
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Parses strictly: every element is closed in order. Collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make_run(folder: Path) -> Path:
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step in range(1, 1001):
            writer.log(step, "sft", {"train/loss": 1 / step})
        for step in range(1, 61):
            kl = math.nan if step == 7 else 0.01 * step
            writer.log(step, "ppo", {"rollout/reward_mean": step, "train/kl": kl, "timing/a": 1, "timing/b": 2})
        writer.log(60, "ppo" + EVIL[:27], {f"odd/{EVIL[:27]}": 1.0})
    summary = Summary()
    summary.set("recipe", EVIL)
    summary.set("description", EVIL)
    summary.set("eval.sft.gold_score", 0.512345)
    summary.set("eval.sft.by_group", {EVIL: {"gold_score": 0.25}, "sort": {"gold_score": 0.75}})
    summary.set("eval.ppo.by_group", {"sort": {"gold_score": 0.875}})
    curve = {"low": [0.4, 0.5], "sides": [60, 20], "predicted": [0.44, 0.56], "observed": [0.5, 0.25]}
    summary.set("reward_model", {"pairs": 40, "calibration_error": 0.1225, "calibration": curve})
    summary.finish("failed", EVIL)
    summary.write(folder / "summary.json")
    sample = {"prompt": EVIL, "before": EVIL, "after": "fine", "score_before": -1.5, "score_after": 2}
    (folder / "samples.json").write_text(json.dumps([sample]))
    (folder / "config.yaml").write_text(f"reward: {{url: 'http://example.org'}}  # {EVIL[:27]}\n")
    return folder


def test_report_is_complete_escaped_and_self_contained(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path)).read_text("utf-8")
    page = Page(html)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert "@import" not in html
    assert "url(" not in html
    text = "".join(page.text)
    assert text.count("<script>alert('x')</script>") >= 6  # shown as text, once for each place
    for shown in (
        "failed",
        "0.512",
        "0.875",
        "before, score -1.5",
        "after, score 2",
        "http://example.org",
        "0.122, 40 pairs",
    ):
        assert shown in text
    assert "rollout/reward_mean, step 60: 60" in text  # on hover
    assert page.tags.count("svg") == 6  # calibration; sft loss; reward, KL, timings; the odd one
    assert len(html) < 300_000  # 1,000 steps are thinned out


def test_report_of_a_run_that_hardly_began(tmp_path: Path) -> None:
    Page(write_report(tmp_path).read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "ppo", "time": 0, "train/kl": null}\n{"step": 2, "st')
    assert "svg" not in Page(write_report(tmp_path).read_text()).tags
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is no valid JSON"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        write_report(tmp_path / "nothing")


def test_chart_breaks_at_gaps_and_survives_flat_lines() -> None:
    svg = chart("KL", "", {"kl": [(1, 0.1), (2, 0.2), (3, None), (4, math.nan), (5, 0.3), (6, 0.2)]})
    assert re.search(r'class="l"[^>]* d="([^"]*)"', svg)[1].count("M") == 2  # type: ignore[index]
    for constant in (0.0, 5.0, -3e-9, 1e12):
        Page(chart("flat", "", {"x": [(3, constant)]}))
    assert chart("none", "", {}) == chart("none", "", {"x": [(1, None)]}) == ""
    assert chart("many", "s", {f"s{i}": [(1, i), (2, i + 1)] for i in range(9)}).count("<path") == 9


def test_a_calibrated_model_lies_on_the_diagonal() -> None:
    points = [0.05, 0.5, 0.95]
    svg = calibration_chart("Calibration", "", points, points, [10, 40, 10])
    Page(svg)
    diagonal, *_ = re.findall(r'<line class="g" x1="(\S+)" x2="(\S+)" y1="(\S+)" y2="(\S+)"', svg)
    x1, x2, y1, y2 = map(float, diagonal)
    circles = re.findall(r'<circle class="p" cx="(\S+)" cy="(\S+)"', svg)
    for share, (x, y) in zip(points, circles, strict=True):
        assert float(x) == pytest.approx(x1 + share * (x2 - x1), abs=0.1)
        assert float(y) == pytest.approx(y1 + share * (y2 - y1), abs=0.1)
    assert "predicted 0.500, observed 0.500, 40 responses" in svg
    heights = [float(a) - float(b) for a, b in re.findall(r'class="b"[^>]* y1="(\S+)" y2="(\S+)"', svg)]
    assert heights[0] == heights[2] == pytest.approx(heights[1] / 4, abs=0.1)


def test_proxy_and_gold_are_drawn_against_the_kl(tmp_path: Path) -> None:
    """Each as its change in standard deviations of the start, and where gold turned."""
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step, kl, reward, gold in ((0, 0.0, 1.0, 0.5), (10, 1.0, 2.0, 0.7), (20, 4.0, 3.0, 0.6)):
            figures = {"eval/reward": reward, "eval/gold": gold, "eval/sqrt_kl": math.sqrt(kl), "eval/kl": kl}
            writer.log(step, "eval", figures | {"eval/reward_std": 2.0, "eval/gold_std": 0.4})
    summary = Summary()
    turns = {"gold": {"turn": {"step": 10, "sqrt_kl": 1.0}}, "reward": {"turn": {"step": 20, "sqrt_kl": 2.0}}}
    summary.set("overoptimization", turns)
    summary.write(tmp_path / "summary.json")
    page = Page(write_report(tmp_path).read_text("utf-8"))
    text = "".join(page.text)
    for shown in ("reward, √KL 2: 1", "gold, √KL 1: 0.5", "gold, √KL 2: 0.25", "gold turns"):
        assert shown in text
    assert "reward turns" not in text
    assert page.attributes.count(("class", "m")) == 1


def test_two_evaluations_are_no_curve(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step in (0, 10):
            writer.log(step, "eval", {"eval/reward": step, "eval/reward_std": 1.0, "eval/sqrt_kl": step})
    assert "Over-optimisation" not in write_report(tmp_path).read_text("utf-8")


def test_a_mark_stands_at_its_place_on_the_axis() -> None:
    svg = chart("gold", "", {"gold": [(0.0, 1), (0.5, 2), (2.0, 1)]}, "√KL", {"turns": 0.5})
    (mark,) = re.findall(r'class="m" x1="([\d.]+)"', svg)
    circles = [float(x) for x in re.findall(r'<circle class="h" cx="([\d.]+)"', svg)]
    assert float(mark) == circles[1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4, [0, 1, 2, 3, 4]), (0.12, 0.31, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]), (-7, 12, [-10, -5, 0, 5, 10, 15])],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(expected)
