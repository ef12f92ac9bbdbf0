"""Writes the reference of all config keys, from the types, defaults and docstrings of the config tree.

python -m rlhf_dist.config_docs > docs/config.md
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_dist.config import Config
from rlhf_dist.config_io import is_list, section_of

HEADER = """\
# Config keys

<!-- Generated: python -m rlhf_dist.config_docs > docs/config.md -->

A run reads one YAML file (`--config FILE`; without it the embedded `rlhf_dist/default.yaml`). Overrides on the command
line come last and win: `key.path=value`, where the value is YAML. `--print-config` prints the result with every
default, `--dry-run` explains it. An unknown key, a wrong type or a contradiction stops the run with exit code 2 and one
message.

A file that begins with `base: default`, or `base: OTHER.yaml` with a file beside it, holds only what differs from that.
What a file leaves out has the default below; the files in `configs/` and the embedded default set many of them.
`null` means "not given". A list (`reward.components`) is replaced as a whole, never merged. What the batch sizes mean
stands in [concepts.md](concepts.md#batch-sizes), what the keys of `algo` compute in [algorithms.md](algorithms.md).
"""

NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    dict: "mapping",
    Any: "any",
}


def main() -> None:
    print(markdown(), end="")


def markdown() -> str:
    """The whole page: one table per section; sections of one kind (every ``optim``) share a table."""
    defaults = {name: default(field) for name, field in Config.model_fields.items()}
    places: dict[type[BaseModel], dict[str, Any]] = {}
    _collect(Config, "", defaults, places)
    return HEADER + "".join(_section(kind, found) for kind, found in places.items())


def default(field: FieldInfo) -> Any:
    """Default of a field; for a section, an instance of it."""
    return None if field.is_required() else field.get_default(call_default_factory=True)


def type_name(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """A type in words, such as ``integer > 0`` or ``number or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0], [*arguments[1:], *bounds])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {type_name(arguments[0])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    return NAMES[origin or annotation] + _bounds(bounds)


def _bounds(metadata: Sequence[Any]) -> str:
    found = []
    for item in metadata:
        match item:
            case FieldInfo():  # inside Annotated, pydantic's own bounds come in a nested field
                found.append(_bounds(item.metadata))
            case Gt(gt=value):
                found.append(f" > {value}")
            case Ge(ge=value):
                found.append(f" ≥ {value}")
            case Lt(lt=value):
                found.append(f" < {value}")
            case Le(le=value):
                found.append(f" ≤ {value}")
    return ",".join(found)


def _collect(
    kind: type[BaseModel], path: str, values: dict[str, Any], places: dict[type[BaseModel], dict[str, Any]]
) -> None:
    """``places``: every section class with the paths at which it stands and the values there."""
    places.setdefault(kind, {})[path] = values
    for name, field in kind.model_fields.items():
        child, listed = section_of(field.annotation), is_list(field.annotation)
        if child is None:
            continue
        inside = f"{path}.{name}".lstrip(".") + ("[]" if listed else "")
        own = {n: default(f) for n, f in child.model_fields.items()} if listed else dict(values[name])
        _collect(child, inside, own, places)


def _section(kind: type[BaseModel], places: dict[str, dict[str, Any]]) -> str:
    title = ", ".join(f"`{path}`" for path in places) if "" not in places else "Top level"
    rows = [
        f"| `{name}` | {type_name(field.annotation, field.metadata)} | {_defaults(name, places)} | {_text(field)} |"
        for name, field in kind.model_fields.items()
        if is_list(field.annotation) or section_of(field.annotation) is None
    ]
    if not rows:
        return ""
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    return f"\n## {title}\n\n{_plain(inspect.getdoc(kind) or '')}\n\n{table}\n"


def _defaults(name: str, places: dict[str, dict[str, Any]]) -> str:
    """The default; where it differs between sections of one kind, each of them."""
    by_value: dict[str, list[str]] = {}
    for path, values in places.items():
        by_value.setdefault(_value(values[name]), []).append(path)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(f'`{p}`' for p in paths)})" for value, paths in by_value.items())


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        value = [item.model_dump(exclude_defaults=True) for item in value]
    if isinstance(value, str):
        return f"`{value}`" if value else '`""`'
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


def _text(field: FieldInfo) -> str:
    return _plain(field.description or "").replace("|", "\\|")


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


if __name__ == "__main__":
    main()
