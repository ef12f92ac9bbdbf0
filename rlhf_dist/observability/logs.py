"""Keeps what libraries print out of the user's way, in files, and reads the end of such a file for an error message."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

NOISY = ("vllm", "ray", "deepspeed", "DeepSpeed", "transformers", "huggingface_hub", "datasets", "torch", "py.warnings")


class _LogFile(logging.FileHandler):
    """Takes the records of all libraries, and takes away the terminal handlers that they install later on.

    Libraries add handlers when they are imported or started (transformers and DeepSpeed on import, ray in
    ``ray.init``). This one stands first in every list, so it sees a record before they do.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._format = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        # Not the formatter of the handler: ray sets its own there, which has no name in it.
        return self._format.format(record)

    def emit(self, record: logging.LogRecord) -> None:
        # A library that hands its records to the root logger too (transformers does where CI is set) says it once.
        if not record.__dict__.setdefault("written_to_log_file", False):
            record.__dict__["written_to_log_file"] = True
            super().emit(record)
        self.install()

    def install(self) -> None:
        for name in (None, *NOISY):
            handlers = logging.getLogger(name).handlers
            handlers[:] = [self, *(h for h in handlers if not isinstance(h, _LogFile) and not _on_terminal(h))]


def _on_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def quiet_libraries(log_file: str | Path) -> None:
    """Send Python warnings and the log records of this process to ``log_file`` instead of the terminal.

    Covers libraries that are imported later. A second call changes the file. vLLM is told by its environment
    variable not to set up logging, here and in processes started from here.
    """
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    logging.captureWarnings(True)
    # The root takes every library that is not named: without a handler there, logging prints warnings to stderr.
    _LogFile(os.path.abspath(log_file)).install()
    for name in NOISY:
        logger = logging.getLogger(name)
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def redirect_output(path: str | Path) -> None:
    """Append everything that this process and its children print from now on to ``path``, line by line.

    Works on the file descriptors 1 and 2, so that output of C++ code and of loggers that hold the old ``sys.stderr``
    goes there as well. For Ray actors: call it first thing in ``__init__``.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def tail(path: str | Path, n: int = 20) -> list[str]:
    """The last ``n`` lines, without line ends; [] if the file is not there (a process that died before its start)."""
    if n <= 0 or not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        position = file.seek(0, os.SEEK_END)
        data = b""
        # One newline more than lines: the piece before it may be half a line.
        while position > 0 and data.count(b"\n") <= n:
            size = min(8192, position)
            position = file.seek(position - size)
            data = file.read(size) + data
    return data.decode("utf-8", errors="replace").splitlines()[-n:]
