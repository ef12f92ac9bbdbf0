"""What all sections of the config tree share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


def is_function(name: str) -> bool:
    """Whether ``name`` reads package.module:function."""
    return name.count(":") == 1 and all(part.isidentifier() for part in name.replace(":", ".").split("."))


def load_function(name: str) -> Callable[..., Any]:
    """``package.module:function``.

    Raises:
        ValueError: the module cannot be imported, or has no such function.
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"function {name!r}: cannot import {module_name}: {error}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"function {name!r}: module {module_name} has no function {function!r}")
    return found


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
