"""What README.md and docs/ say is checked against the code: files, keys, commands, metrics, the quoted loop."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist import config_docs
from rlhf_dist.config_io import all_keys, load
from rlhf_dist.observability.report import TILES

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "k8s" / "README.md",
    *sorted(ROOT.glob("cluster/*.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
KEYS = {key.replace("[]", "") for key in all_keys()}
PREFIXES = {key.rsplit(".", n)[0] for key in KEYS for n in range(1, key.count(".") + 1)}
SECTIONS = {prefix for prefix in PREFIXES if "." not in prefix}
#: Keys whose value is a mapping of the user's own.
OPEN = ("model.architecture", "headers", "resources", "set")
FILE_ENDINGS = (".py", ".md", ".yaml", ".sh", ".toml", ".svg", ".json", ".jsonl", ".gz")
#: Folders of a run, not of the repository; they exist after a run only.
RUN_FOLDERS = {"rollouts", "checkpoints", "runs", "sft", "reward_model", "policy", "tokenizer", "initial_model", "logs"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """Bodies of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def inline(text: str) -> list[str]:
    """Inline code outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(text: str) -> Iterator[str]:
    """Command lines: indented code, and inline code that runs something."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.strip() for line in lines if line.startswith("    ")] + inline(text)
    yield from (c.split("  #")[0].strip() for c in found if re.match(r"(python|make|ray|cluster/\S+) ", c))


def is_key(name: str) -> bool:
    return name in KEYS | PREFIXES or any(name.startswith(f"{o}.") or f".{o}." in name for o in OPEN)


def flat(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a YAML tree; elements of lists count as their list."""
    if isinstance(tree, list):
        for item in tree:
            yield from flat(item, prefix) if isinstance(item, dict) else [prefix]
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


@cache
def metric_words() -> set[str]:
    """Words in the string literals of what makes metrics; docstrings and what only shows metrics do not count."""
    words: set[str] = set()
    for folder in ("recipes", "actors", "engines", "evaluation", "data", "algorithms"):
        for file in (ROOT / "rlhf_dist" / folder).glob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    words.update(re.findall(r"\w+", node.value))
    return words


@cache
def summary_keys() -> set[str]:
    """Keys of summary.json, whose first part may be that of a config section."""
    source = "".join(file.read_text() for file in (ROOT / "rlhf_dist" / "recipes").glob("*.py"))
    return {key for key, _ in TILES} | set(re.findall(r'summary\.set\("([\w.]+)"', source))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_config_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "config.md").read_text()
    assert written == config_docs.markdown(), "run: python -m rlhf_dist.config_docs > docs/config.md"


def test_config_reference_has_every_key_once() -> None:
    """Every key stands in the one table of its section, with type, default and meaning."""
    text = config_docs.markdown()
    sections = text.split("\n## ")[1:]
    for key in all_keys():
        section, _, name = key.rpartition(".")
        heading = f"`{section}`" if section else "Top level"
        tables = [t for t in sections if heading in t.splitlines()[0]]
        assert len(tables) == 1, key
        rows = re.findall(rf"^\| `{name}` \| (\S.*) \| (\S.*) \| (\S.*) \|$", tables[0], re.MULTILINE)
        assert len(rows) == 1, key


def test_types_and_defaults_are_told_in_words() -> None:
    text = config_docs.markdown()
    assert "| `top_p` | number > 0, ≤ 1 | `1` |" in text
    assert "| `zero_stage` | `1`, `2`, `3` | `2` |" in text
    assert "| `betas` | list of 2: number ≥ 0, ≤ 1 | `[0.9, 0.95]` |" in text
    assert "| `value_clip` | number > 0 or null | `0.2` |" in text
    assert "`1e-06` (`policy.optim`)" in text


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for name in inline(page.read_text()):
        is_file = name.endswith(FILE_ENDINGS) and "/" in name and re.fullmatch(r"[\w./*-]+", name)
        if is_file and name.split("/")[0] not in RUN_FOLDERS:
            assert list(ROOT.glob(name)), f"{page.name} names {name}"


def test_the_tree_of_the_readme_exists() -> None:
    (tree,) = [b for b in blocks((ROOT / "README.md").read_text(), "text") if b.startswith("rlhf_dist/")]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


@pages
def test_keys_that_are_named_exist(page: Path) -> None:
    text = page.read_text().replace("key.path=value", "")
    if page.name == "migration.md":  # the other columns are other systems' names
        text = re.sub(r"^(\|[^|]*\|).*$", r"\1", text, flags=re.MULTILINE)
    for key in re.findall(r"(?<![\w./-])([a-z]\w*(?:\.\w+)+)=", text):
        assert is_key(key), f"{page.name}: {key}="
    for name in inline(text):
        dotted = re.fullmatch(r"([a-z]\w*)(?:\.[a-z]\w*)+", name)
        if dotted and dotted[1] in SECTIONS and not name.endswith(FILE_ENDINGS):
            assert is_key(name) or name in summary_keys(), f"{page.name}: {name}"
    for block in blocks(text, "yaml"):
        for key in flat(yaml.safe_load(block)):
            assert is_key(key), f"{page.name}: {key}"


@pages
def test_commands_are_valid(page: Path) -> None:
    """Configs exist and load with the overrides; make's targets exist; so do the scripts."""
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page.read_text()):
        words = shlex.split(command)
        if words[0] == "make":
            targets = [w for w in words[1:] if "=" not in w]
            assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets), command
        if "rlhf_dist.main" not in command:
            continue
        arguments = words[words.index("rlhf_dist.main") + 1 :] if "rlhf_dist.main" in words else []
        config = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
        if config and config.isupper():  # a placeholder, such as FILE
            continue
        assert config is None or (ROOT / config).is_file(), command
        load(str(ROOT / config) if config else None, [a for a in arguments if "=" in a])


@pages
def test_overrides_of_make_demo_load(page: Path) -> None:
    for arguments in re.findall(r'make demo ARGS="([^"]+)"', page.read_text()):
        load(None, arguments.split())


def test_metrics_that_are_named_exist() -> None:
    named = {
        name
        for page in PAGES
        for name in inline(page.read_text())
        if re.fullmatch(r"(rollout|train|timing|perf|weight_sync|eval)/[a-z]\w*", name)
    }
    assert len(named) > 30
    for name in named:
        figure = name.partition("/")[2].removeprefix("critic_")
        assert figure in metric_words(), name


def test_the_loop_of_the_readme_is_the_real_one() -> None:
    """Every line of the quotation stands in ppo.py, in this order."""
    (quoted,) = blocks((ROOT / "README.md").read_text(), "python")
    source = (line.strip() for line in (ROOT / "rlhf_dist" / "recipes" / "ppo.py").read_text().splitlines())
    for line in filter(None, (line.strip() for line in quoted.splitlines())):
        assert line in source, f"{line!r} is not in ppo.py, or not in this place"
