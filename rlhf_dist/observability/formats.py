"""How numbers, durations and foreign text are shown to people."""

from __future__ import annotations

import math
import re

# Control characters, overrides of the writing direction and lone surrogates: a model that is still random emits
# all of them, and on a terminal they move the cursor, hide text or cannot be encoded. Tab and newline stay.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def human(value: object) -> str:
    """A figure with three significant digits and k, M, G or T for thousands; anything but a number as text.

    >>> [human(x) for x in (0.123456, 12000, 999.9, 3, True, "6/8")]
    ['0.123', '12k', '1k', '3', 'yes', '6/8']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if not isinstance(value, int | float):
        return printable(str(value))
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) < 999.5:
        return f"{value:.3g}"
    for power, unit in enumerate("kMGT", 1):
        scaled = value / 1000**power
        if abs(scaled) < 999.5:
            return f"{scaled:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def printable(text: str) -> str:
    """Text in which characters that would control a terminal are shown as escapes, like ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)
