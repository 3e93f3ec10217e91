"""Plots of the report: matplotlib draws them, as SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import itertools
import re

# Drawn in these colours; in the page each becomes a variable, so that one drawing suits light and dark.
# Blue and vermilion are from Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "#1b1f24": "var(--ink)",
    "#5b6470": "var(--muted)",
    "#dfe3e8": "var(--line)",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
}
INK, MUTED, LINE, BLUE, ORANGE = COLOURS
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}
FEW_EPOCHS = 25  # up to here every epoch gets its dot


def learning_curve(phases, figure_name) -> str:
    """One figure of every epoch of every phase ("loss" or "accuracy"), training and validation, as SVG.

    phases: the report's list of phases; a phase that was not kept is drawn pale. Rings mark the epochs
    whose weights were kept. A phase of L-BFGS comes alone: its axis is iterations, with a dot per penalty.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure_name}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        start, epochs = 0, sum(len(phase["history"]) for phase in phases)
        marker = "." if epochs <= FEW_EPOCHS else None
        for phase in phases:
            history, alpha = phase["history"], 1.0 if phase["kept"] else 0.4
            x = range(start + 1, start + 1 + len(history))
            if "solver" in phase:
                x = list(itertools.accumulate(row["iterations"] for row in history))
            for key, colour, line in ((figure_name, ORANGE, "--"), (f"val_{figure_name}", BLUE, "-")):
                y = [number_or_gap(epoch.get(key)) for epoch in history]
                axes.plot(x, y, line, color=colour, marker=marker, alpha=alpha, linewidth=1.8)
            for number, (position, epoch) in enumerate(zip(x, history), start=1):
                value = epoch.get(f"val_{figure_name}")
                if phase["kept"] and number == phase["best_epoch"] and value is not None:
                    axes.plot(position, value, "o", markersize=11, markerfacecolor="none",
                              markeredgecolor=INK, markeredgewidth=1.6)  # fmt: skip
            if start:
                axes.axvline(start + 0.5, color=MUTED, linestyle=":", linewidth=1.4)
            if len(phases) > 1:
                # Names sit on both sides of the switch, where they never meet however short a phase is.
                position, side = (start + 0.5, "left") if start else (len(history) + 0.5, "right")
                axes.annotate(phase_title(phase["name"]), (position, 1), (5 if start else -5, 4), ha=side,
                              xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
            start += len(history)
        if "solver" in phases[0]:
            axes.set_xlabel("iteration of L-BFGS (a dot per penalty, strong to weak)")
        else:
            axes.set_xlim(0.5, max(epochs, 1) + 0.5)
            axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(figure_name)
        if figure_name == "accuracy":
            axes.yaxis.set_major_formatter(lambda share, position: f"{round(100 * share, 2):g}%")
        return svg(figure, figure_name, f"{figure_name} per epoch, training and validation")


def reliability_plot(bins, multi_label: bool = False) -> str:
    """Accuracy against confidence per bin, above the share of answers in each bin, as SVG.

    With `multi_label` an answer is a class's probability for one example, and right where the class is there.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    filled = [row for row in bins if row["count"]]
    total = sum(row["count"] for row in filled)
    confidence, accuracy = [row["confidence"] for row in filled], [row["accuracy"] for row in filled]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "reliability"}):
        figure = Figure(figsize=(5.2, 5.2), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], ":", color=MUTED, linewidth=1.4)
        axes.plot(confidence, accuracy, "-", color=BLUE, linewidth=1.4)
        sizes = [20 + 230 * row["count"] / total for row in filled]
        axes.scatter(confidence, accuracy, s=sizes, color=BLUE, zorder=3, clip_on=False)
        axes.annotate("too cautious", (0.04, 0.95), color=MUTED, va="top")
        axes.annotate("too sure", (0.98, 0.05), color=MUTED, ha="right")
        axes.set(
            xlim=(0, 1.02), ylim=(0, 1.02), ylabel="share that had the class" if multi_label else "share that was right"
        )
        below.bar([row["lower"] for row in bins], [row["count"] / total for row in bins], align="edge",
                  width=[0.9 * (row["upper"] - row["lower"]) for row in bins], color=BLUE)  # fmt: skip
        below.set(
            xlabel="probability of a class" if multi_label else "how sure the model said it was", ylabel="answers"
        )
        for axis in (axes.xaxis, axes.yaxis, below.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        return svg(figure, "reliability", "Accuracy against confidence")


def phase_title(name) -> str:
    """What people read for a phase's name: "fine_tune" -> "Fine-tuning"."""
    titles = {"head": "Head only", "fine_tune": "Fine-tuning", "light": "Top blocks", "full": "Whole backbone"}
    return titles.get(name, name.replace("_", " ").capitalize())


def number_or_gap(value) -> float:
    """A figure to plot; a missing one is a gap in the line."""
    return float("nan") if value is None else value


def svg(figure, name, description) -> str:
    """The figure as an <svg> element for an HTML page: ids unique by name, colours as page variables."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML prologue, which HTML does not know
    # Matplotlib's own style element would apply to the whole page.
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
