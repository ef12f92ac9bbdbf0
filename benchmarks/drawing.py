"""Charts of the report as one SVG file that stands alone: for pages that take a picture and no HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf_dist.observability.charts import HEIGHT, WIDTH

#: Above each chart, for its title, note and legend; between charts.
HEAD, GAP = 52, 16
#: Width of a letter of a legend, about.
LETTER = 6.5
#: Of the report in a light window; not every program that draws SVG knows variables.
COLOURS = ("#2563c9", "#c2571a", "#1b8a6b", "#a03b8c", "#8a6d00", "#5b6470")
STYLE = (
    "text{font:11px sans-serif;fill:#5d6878}.t{font-size:14px;fill:#1c2430}.g{stroke:#dde2e9}"
    ".m{stroke:#5d6878;stroke-dasharray:4 3}.l{fill:none;stroke-width:2}.raw{stroke-width:1;opacity:.35}"
    ".h{fill:transparent}.b{stroke:#2563c9;stroke-width:8;opacity:.2}.p{fill:#2563c9}"
)


def drawing(figures: Sequence[str], columns: int = 1) -> str:
    """``figures`` as :mod:`rlhf_dist.observability.charts` makes them, in rows of ``columns``."""
    panels = []
    for i, figure in enumerate(figures):
        x, y = i % columns * (WIDTH + GAP), i // columns * (HEAD + HEIGHT + GAP)
        panels.append(f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEAD + HEIGHT}">{_panel(figure)}</svg>')
    width = columns * (WIDTH + GAP)
    height = -(-len(figures) // columns) * (HEAD + HEIGHT + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -6 {width} {height}"><style>{STYLE}</style>'
        f'<rect x="-10" y="-6" width="{width}" height="{height}" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def _panel(figure: str) -> str:
    caption = re.search(r"<figcaption>(.*?)</figcaption>", figure, re.DOTALL)
    plot = re.search(r"<svg.*</svg>", figure, re.DOTALL)
    assert caption is not None
    assert plot is not None
    title, _, note = caption[1].partition("<span")
    note = re.sub(r"^[^>]*>|</span>", "", note)
    head = f'<text class="t" x="0" y="14">{title.strip()}</text>'
    if note:
        head += f'<text x="0" y="30">{note}</text>'
    x = 0.0
    for colour, name in re.findall(r'<i style="background:(var\(--s\d\))"></i>([^<]*)', figure):
        head += f'<rect x="{x:.0f}" y="41" width="14" height="3" fill="{colour}"/>'
        head += f'<text x="{x + 20:.0f}" y="46">{name}</text>'
        x += 40 + LETTER * len(name)
    panel = head + plot[0].replace("<svg ", f'<svg y="{HEAD}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return re.sub(r"var\(--s(\d)\)", lambda match: COLOURS[int(match[1])], panel)
