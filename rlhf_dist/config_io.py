"""Reads, merges and validates a config; turns every mistake into one clear message.

>>> load("configs/algorithms/grpo.yaml", ["train.steps=20"])

Sources, later ones win: the embedded default (no file given), or the file that
a YAML file names as its ``base`` and that file; then the overrides. Errors name
key, value, source and the nearest valid key.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_dist.config import Config

EMBEDDED_DEFAULT = Path(__file__).parent / "default.yaml"


_MISSING = object()


class ConfigError(ValueError):
    """A mistake of the user; ``main`` prints it without a traceback and exits with 2."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 takes it for a string) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            place = f"{self.name}, line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise ConfigError(f"{place}: key {key!r} must be a string, got {type(key).__name__}; quote it")
            if key in seen:
                raise ConfigError(f"{place}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load(path: str | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """The validated config of ``path`` (default: the embedded one) with ``key.path=value`` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or contradiction.
    """
    sources = _files(path)
    for text in overrides:
        sources.append((f"override {text!r}", _parse_override(text)))
    merged: dict[str, Any] = {}
    for _, tree in sources:
        _merge(merged, tree)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources, merged)) from None


def _files(path: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The file and those that it is based on, the most basic one first; each with its name for messages."""
    sources: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    file, name = (Path(path), path) if path else (EMBEDDED_DEFAULT, "embedded default")
    while True:
        tree = _read_yaml(file)
        base = tree.pop("base", None)
        sources.insert(0, (name, tree))
        seen.append(file.resolve())
        if base is None:
            return sources
        if not isinstance(base, str):
            raise ConfigError(f"{name}: base must be `default` or a file beside this one, got {_short(base)}")
        file, name = (EMBEDDED_DEFAULT, "embedded default") if base == "default" else (file.parent / base, base)
        if file.resolve() in seen:
            raise ConfigError(f"{sources[0][0]}: base: {base} is based on this file; a config cannot be its own base")


def dump(config: BaseModel) -> str:
    """The fully resolved config as YAML; ``load`` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read config {file}: not UTF-8 at byte {error.start}") from None
    try:
        tree = _parse_yaml(text, str(file))
    except yaml.YAMLError as error:
        raise ConfigError(f"config {file} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {file}: expected a mapping at the top, got {type(tree).__name__}")
    return tree


def _parse_yaml(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    return loader.get_single_data()


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {text!r} must read key.path=value, for example train.steps=20")
    try:
        tree = _parse_yaml(value, f"override {text!r}")
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        # An empty mapping empties: model.architecture={} is how an override takes a key of a file back.
        if isinstance(value, dict) and value and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(error: ValidationError, sources: list[tuple[str, dict[str, Any]]], merged: dict[str, Any]) -> str:
    lines = []
    for e in error.errors():
        path = tuple(e["loc"])
        dotted = ".".join(str(p) for p in path)
        where = next((name for name, tree in reversed(sources) if _has(tree, path)), "config")
        if e["type"] == "extra_forbidden":
            near = _nearest(path)
            hint = f"; did you mean {near}?" if near else "; see --print-config for all keys"
            lines.append(f"{where}: unknown key {dotted} (value {_short(e['input'])}){hint}")
        elif e["type"] == "value_error":
            text = str(e["ctx"]["error"])
            lines.append(f"{_blame(text, path, sources)}: {dotted + ': ' if dotted else ''}{text}")
        else:
            lines.append(f"{where}: {dotted} = {_short(e['input'])}: {e['msg'][0].lower() + e['msg'][1:]}")
    return "\n".join(lines)


def _blame(text: str, path: tuple[Any, ...], sources: list[tuple[str, dict[str, Any]]]) -> str:
    """The newest source that sets a key which the message of a contradiction in the section ``path`` names."""
    for name, tree in reversed(sources):
        if any(re.search(rf"\b{re.escape(key)}\b", text) for key in _leaves(_at(tree, path))):
            return name
    return next((name for name, tree in reversed(sources) if _has(tree, path)), "config")


def _leaves(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix] if prefix else []
    return [leaf for k, v in tree.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value under ``path``, or ``_MISSING``."""
    for part in path:
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not in_list and not (isinstance(tree, dict) and part in tree):
            return _MISSING
        tree = tree[part]
    return tree


def _has(tree: Any, path: tuple[Any, ...]) -> bool:
    return _at(tree, path) is not _MISSING


def _nearest(path: tuple[Any, ...]) -> str | None:
    """The valid key nearest to an unknown one: in its own section first, then in the whole tree."""
    section: Any = Config
    for part in path[:-1]:
        section = _child(section, part)
        if section is None:
            return None
    own = difflib.get_close_matches(str(path[-1]), list(section.model_fields), n=1, cutoff=0.6)
    if own:
        return ".".join([*[str(p) for p in path[:-1]], own[0]])
    everywhere = {key.split(".")[-1]: key for key in all_keys()}
    match = difflib.get_close_matches(str(path[-1]), list(everywhere), n=1, cutoff=0.75)
    return everywhere[match[0]] if match else None


def _child(section: type[BaseModel], part: Any) -> type[BaseModel] | None:
    if isinstance(part, int):
        return section  # the list's element type was resolved with its name
    field = section.model_fields.get(str(part))
    return section_of(field.annotation) if field else None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class that a field holds, by itself or in a list; None for a plain value."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    for argument in typing.get_args(annotation):
        if (found := section_of(argument)) is not None:
            return found
    return None


def is_list(annotation: Any) -> bool:
    """Whether a field holds a list, or a list or nothing."""
    return list in (typing.get_origin(a) for a in (annotation, *typing.get_args(annotation)))


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all keys (elements of lists as ``key[]``)."""
    keys = []
    for name, field in section.model_fields.items():
        child = section_of(field.annotation)
        if child is None:
            keys.append(prefix + name)
        else:
            keys += all_keys(child, f"{prefix}{name}{'[]' if is_list(field.annotation) else ''}.")
    return keys


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
