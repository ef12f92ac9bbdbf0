"""What all sections of the config tree share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


def is_function(name: str) -> bool:
    """Whether ``name`` reads package.module:function."""
    return name.count(":") == 1 and all(part.isidentifier() for part in name.replace(":", ".").split("."))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
