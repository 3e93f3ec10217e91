"""curve.html: accuracy by share of the data, the power law through it and beyond, one self-contained page."""

from __future__ import annotations

import pathlib
import shlex

import numpy as np

from pipelines import report, runs
from pipelines.facts import NOUNS
from pipelines.plots import BLUE, MUTED, ORANGE, STYLE, svg

TEMPLATE = pathlib.Path(__file__).with_name("curve.html.j2")


def write_page(folder: pathlib.Path, gathered: dict) -> pathlib.Path:
    """Write curve.html into `folder`, whole or not at all; gathered: as curve.json holds it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": report.percent, "count": report.count, "duration": report.duration}
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        gathered=gathered,
        now=gathered["points"][-1],
        style=report.TEMPLATE.read_text("utf-8").partition("<style>")[2].partition("</style>")[0],
        noun=NOUNS[gathered["kind"]],
        plot=size_plot(gathered),
        command=f"graft curve --data {shlex.quote(gathered['data'])} --backbone {shlex.quote(gathered['backbone'])}",
    )
    target = folder / "curve.html"
    runs.write_text(target, text)
    return target


def size_plot(gathered: dict) -> str:
    """Accuracy with its interval against training examples, and the power law to twice as many, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    points, twice, law = gathered["points"], gathered["twice"], gathered["power_law"]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "size"}):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        counts = np.geomspace(points[0]["examples"], twice["examples"], 60)
        axes.plot(counts, 1 - np.minimum(law["a"] * counts ** -law["b"], 1), ":", color=MUTED, linewidth=1.6)
        for row, colour in [*((row, BLUE) for row in points), (twice, ORANGE)]:
            axes.plot([row["examples"]] * 2, row["interval"], color=colour, linewidth=1.6)
            filled = "white" if row is twice else colour
            axes.plot(row["examples"], row["accuracy"], "o", markersize=9, color=colour, markerfacecolor=filled,
                      markeredgewidth=1.6)  # fmt: skip
        axes.annotate("foretold", (twice["examples"], twice["accuracy"]), (-10, 12), textcoords="offset points",
                      color=MUTED, ha="right")  # fmt: skip
        axes.set_xscale("log")
        ticks = [row["examples"] for row in (*points, twice)]
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("training examples")
        axes.set_ylabel("share right on the test set")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, position: f"{100 * share:.3g}%"))
        return svg(figure, "size", "Accuracy against training examples, with twice as many foretold")
