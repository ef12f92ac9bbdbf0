"""Writes the lock: common.txt, what CPU and GPU machines share; cpu.txt and gpu.txt, what differs. Run by `make lock`.

Every package that pyproject.toml leads to, all extras, has one version and the digests of its files. `make setup` and
the image install from the same three files. Versions stay as they are where pyproject.toml still allows it; to move
one, remove its entry first.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SHARED_EXTRAS = ("dev", "hub", "cloud", "bench")
HEADER = "# Made by requirements/lock.py (make lock); do not edit.\n"


def entries(text: str) -> dict[str, str]:
    """``name==version``, with its marker if it has one, to the whole entry with digests."""
    found = re.findall(r"^[a-z0-9].*?(?=^[a-z0-9]|\Z)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), re.M | re.S)
    return {entry.partition(" \\\n")[0].strip(): entry for entry in found}


def resolve(target: str, preferred: list[str], arguments: list[str]) -> dict[str, str]:
    """All packages of an extra and the shared ones; those ``preferred`` keep their version where they can."""
    extras = [word for extra in (target, *SHARED_EXTRAS) for word in ("--extra", extra)]
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    plain = ["--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock.txt"
        out.write_text("\n".join(preferred) + "\n")  # uv takes the versions of its output file for preferences
        command = ["uv", "pip", "compile", "pyproject.toml", *extras, *platform, *plain, *arguments, "-o", str(out)]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            sys.exit(f"error: nothing was written; {' '.join(command)} failed")
        return entries(out.read_text())


def main(arguments: list[str]) -> None:
    """``arguments`` go to uv: where to find the CPU build of torch."""
    paths = {part: HERE / f"{part}.txt" for part in ("common", "cpu", "gpu")}
    old = {part: list(entries(path.read_text())) for part, path in paths.items() if path.exists()}
    cpu = resolve("cpu", old.get("common", []) + old.get("cpu", []), arguments)
    differing = {pin.partition("==")[0] for pin in old.get("gpu", [])}
    alike = [pin for pin in cpu if "+" not in pin and pin.partition("==")[0] not in differing]
    gpu = resolve("gpu", alike + old.get("gpu", []), [])
    shared = {pin: entry for pin, entry in cpu.items() if pin in gpu}
    parts = {"common": shared}
    parts |= {t: {p: e for p, e in all_.items() if p not in shared} for t, all_ in (("cpu", cpu), ("gpu", gpu))}
    for part, found in parts.items():
        paths[part].write_text(HEADER + "".join(found.values()))
        print(f"requirements/{part}.txt: {len(found)} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
