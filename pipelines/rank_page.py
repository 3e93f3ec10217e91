"""rank.html: the table of backbones and the plot of accuracy against cost, one self-contained page."""

from __future__ import annotations

import pathlib
import shlex

from models.names import RANDOM
from pipelines import report, runs
from pipelines.facts import NOUNS
from pipelines.plots import BLUE, INK, MUTED, ORANGE, STYLE, svg
from pipelines.ranking import short_name

TEMPLATE = pathlib.Path(__file__).with_name("rank.html.j2")
NAME = (7, -11)  # where a mark's name begins, in points: below the line of the front
ROOM = 16  # points from one name to that below it


def write_page(folder: pathlib.Path, ranked: dict) -> pathlib.Path:
    """Write rank.html into `folder`, whole or not at all; ranked: what `pipelines.rank.summary` gives."""
    target = folder / "rank.html"
    runs.write_text(target, render(ranked))
    return target


def render(ranked: dict) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": report.percent, "count": report.count, "duration": report.duration}
    environment.filters["name"] = short_name
    names = [row["name"] for row in ranked["backbones"]]
    best = next(row for row in ranked["backbones"] if row["name"] == ranked["recommended"])
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        ranked=ranked,
        best=best,
        # The style sheet of the report: pages of one tool look alike.
        style=report.TEMPLATE.read_text("utf-8").partition("<style>")[2].partition("</style>")[0],
        noun=NOUNS[ranked["kind"]],
        plot=cost_plot(ranked["backbones"], ranked["chance"]),
        random=RANDOM,
        quickest=min(row["milliseconds"] for row in ranked["backbones"]),
        command=f"graft rank --data {shlex.quote(ranked['data'])} --backbones {shlex.quote(','.join(names))}",
        train=train_command(ranked),
        seconds=sum(ranked["seconds"].values()),
    )


def train_command(ranked: dict) -> str:
    """What to type next: a run with the recommended backbone."""
    from pipelines.rank import name_and_size

    base, size = name_and_size(ranked["recommended"])
    flag = {"image": "--image-size", "text": "--sequence-length", "audio": "--window-seconds"}[ranked["kind"]]
    sized = f" {flag} {size}" if size else ""
    return f"graft {ranked['kind']} --data {shlex.quote(ranked['data'])} --backbone {shlex.quote(base)}{sized}"


def cost_plot(rows: list[dict], chance: float) -> str:
    """Accuracy with its interval against milliseconds per example, the Pareto front drawn through, as SVG.

    rows: as `pipelines.rank.summary` has them. chance: what always answering the largest class would reach.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "cost"}):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        front = sorted((row for row in rows if row["on_front"]), key=lambda row: row["milliseconds"])
        accuracy = [row["probe"]["accuracy"] for row in front]
        axes.plot([row["milliseconds"] for row in front], accuracy, color=BLUE, linewidth=1.4, drawstyle="steps-post")
        axes.axhline(chance, color=MUTED, linestyle=":", linewidth=1.4)
        for row in rows:
            colour = ORANGE if row["name"].startswith(RANDOM) else BLUE
            low, high = row["probe"]["interval"]
            x, y = row["milliseconds"], row["probe"]["accuracy"]
            axes.plot([x, x], [low, high], color=colour, linewidth=1.6)
            filled = colour if row["on_front"] else "white"
            axes.plot(x, y, "o", markersize=9, color=colour, markerfacecolor=filled, markeredgewidth=1.6)
        axes.set_xscale("log")
        span = [row["milliseconds"] for row in rows]
        axes.set_xlim(min(span) / 1.35, max(span) * 1.9)
        bottom = min(chance, *(row["probe"]["interval"][0] for row in rows))
        axes.set_ylim(max(0, bottom - 0.06), min(1.03, max(row["probe"]["interval"][1] for row in rows) + 0.06))
        axes.annotate("without looking", (1, chance), (-4, 4), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", color=MUTED)  # fmt: skip
        figure.draw_without_rendering()  # so that places are known
        for row, (x, y) in zip(rows, name_places(rows, axes)):
            axes.annotate(short_name(row["name"]), (row["milliseconds"], row["probe"]["accuracy"]), (x, y),
                          textcoords="offset points", color=INK, va="center")  # fmt: skip
        for which in ("set_major_formatter", "set_minor_formatter"):
            getattr(axes.xaxis, which)(FuncFormatter(lambda value, position: f"{value:g}"))
        if max(span) > 12 * min(span):
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="both", length=3, pad=5)
        axes.set_xlabel("milliseconds per example on this machine")
        axes.set_ylabel("linear probe, share right")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, position: f"{100 * share:.0f}%"))
        return svg(figure, "cost", "Accuracy of the linear probe against milliseconds per example")


def name_places(rows: list[dict], axes) -> list[tuple[float, float]]:
    """Where each name goes, as an offset in points from its mark: right and below, further down where one is there."""
    points = [axes.transData.transform((row["milliseconds"], row["probe"]["accuracy"])) for row in rows]
    dots = 72 / axes.figure.dpi
    taken, places = [], {}
    for index in sorted(range(len(rows)), key=lambda index: -points[index][1]):
        x, y = points[index] * dots
        left, height = x + NAME[0], y + NAME[1]
        right = left + 6.2 * len(short_name(rows[index]["name"]))
        while any(left < end and start < right and abs(height - level) < ROOM for start, end, level in taken):
            height -= 2
        taken.append((left, right, height))
        places[index] = (NAME[0], height - y)
    return [places[index] for index in range(len(rows))]
