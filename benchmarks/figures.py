"""Charts of the report as one HTML page, for a screenshot."""

import re
from collections.abc import Sequence
from pathlib import Path

import unmask.lab.report
from unmask.lab.report.chart import Chart, legend_mark


def page(charts: Sequence[Chart], legend: Sequence[str]) -> str:
    """`legend` names the styles, from 0."""
    assets = Path(unmask.lab.report.__file__).parent / "assets"
    marks = re.search(r"<svg class=.definitions.*?</svg>", (assets / "page.html").read_text(), re.DOTALL)
    figures = "".join(f"<figure>{chart.svg()}<figcaption>{chart.title}</figcaption></figure>" for chart in charts)
    names = "".join(f"<li>{legend_mark(style)} {name}</li>" for style, name in enumerate(legend))
    body = f"<main><ul class=legend>{names}</ul><div class=charts>{figures}</div></main>"
    style = (assets / "page.css").read_text()
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{marks[0] if marks else ''}{body}"
