"""Plots of a run's report as SVG files: calibration of its reward models, and scores against the square root of the KL.

python -m benchmarks.figures RUN --out docs/figures --name hh      # hh_calibration.svg, hh_overoptimization.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.drawing import drawing
from rlhf_dist.observability.metrics import read_metrics
from rlhf_dist.observability.report import against_kl, calibrations


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--name", help="what the files' names begin with; default: the run's")
    args = parser.parse_args(arguments)
    summary = json.loads((args.run / "summary.json").read_text())
    evaluations = [row for row in read_metrics(args.run / "metrics.jsonl") if row["stage"] == "eval"]
    found = {
        "calibration": calibrations(summary),
        "overoptimization": [against_kl(evaluations, summary.get("overoptimization", {}))],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, figures in found.items():
        if figures := [figure for figure in figures if figure]:
            path = args.out / f"{args.name or args.run.name}_{kind}.svg"
            path.write_text(drawing(figures, columns=len(figures)))
            print(path)
        else:
            print(f"{args.run} has nothing to draw for {kind}")


if __name__ == "__main__":
    main()
