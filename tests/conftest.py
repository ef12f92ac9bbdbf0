"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a command sets for its own process (that Ray listens on loopback only, say) does not reach the next test."""
    with mock.patch.dict(os.environ):
        yield


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
