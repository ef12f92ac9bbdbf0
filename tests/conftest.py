"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with ``data/`` (hh_small, gsm8k, ...) and ``models/`` (stories260k); skips where it is missing.

    The variable RLHF_DATA names its ``data`` folder; ``make test`` sets it where ``../shared/data`` exists.
    """
    if "RLHF_DATA" not in os.environ:
        pytest.skip("RLHF_DATA (a folder with hh_small, gsm8k and tinystories) is not set")
    data = Path(os.environ["RLHF_DATA"]).resolve()
    if not data.is_dir():
        pytest.skip(f"RLHF_DATA={data} is not a folder")
    return data.parent
