"""Draws what the benchmarks measured as one picture: `python -m tests.benchmarks.picture RESULTS.json OUT.svg`.

RESULTS.json is what the benchmarks wrote with `--json RESULTS.json`, each under its own name: two_phase, second_run,
input_pipeline, scratch, growth. What is not there is not drawn. OUT may end in .svg or .png; 900 pixels wide.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

from pipelines.plots import BLUE, INK, LINE, MUTED, ORANGE, STYLE

WIDTH_PIXELS, PIXELS_PER_INCH = 900, 96  # of CSS: an SVG's points are 1/72 inch
FIRST_RUN = "Graft, first run"
PAPER = "#ffffff"  # a card of its own, so that the picture reads the same on white and on dark pages


def save_result(path: str, name: str, result: dict) -> None:
    """Put a benchmark's result under its name into a JSON file, beside what is there, with the machine and the day."""
    file = pathlib.Path(path)
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = {**result, "machine": machine(), "date": datetime.date.today().isoformat()}
    file.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> str:
    """The processor, its cores, and TensorFlow's version."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, TensorFlow {importlib.metadata.version('tensorflow')}"


def pairs(results: dict) -> list[tuple]:
    """(what is compared, slower side's name and seconds, faster side's name and seconds) for every bar pair."""
    found = []
    if two_phase := results.get("two_phase"):
        seconds, accuracy = two_phase["seconds"], two_phase["accuracy"]
        both = f"Both phases: {accuracy['graft']:.1%} right, plain Keras {accuracy['plain']:.1%}"
        for figure, title in (("phase_1", "Phase 1, the head"), ("total", both)):
            found.append((title, "plain Keras", seconds["plain"][figure], "Graft", seconds["graft"][figure]))
    if (scratch := results.get("scratch")) and "graft" in scratch:
        title = f"To {scratch['accuracy']:.1%} accuracy, the best from scratch"
        found.append((title, "from scratch", scratch["scratch"], "Graft", scratch["graft"]))
    if second := results.get("second_run"):
        found.append(
            (
                "Another head on the same data, at 224 pixels",
                FIRST_RUN,
                second["first"],
                "Graft, second run",
                second["second"],
            )
        )
    return found


def draw_pairs(axes, found: list[tuple]) -> None:
    """Two bars per comparison, the slower one at full width: seconds are at the bars, the ratio at the right."""
    for place, (title, slow_name, slow, fast_name, fast) in enumerate(found):
        y = 3.2 * place
        longest = max(slow, fast)
        colour_of_slow = MUTED if slow_name == FIRST_RUN else ORANGE  # orange is what is not Graft
        axes.text(0, y - 0.75, title, weight="bold", va="center")
        for offset, name, seconds, colour in ((0, slow_name, slow, colour_of_slow), (0.9, fast_name, fast, BLUE)):
            axes.barh(y + offset, seconds / longest, 0.8, color=colour)
            inside = seconds / longest > 0.5
            axes.annotate(f"{name}  {seconds:.3g} s", (seconds / longest, y + offset), (-6 if inside else 6, 0),
                          textcoords="offset points", va="center_baseline", ha="right" if inside else "left",
                          color=PAPER if inside else INK)  # fmt: skip
        axes.text(1.04, y + 0.45, f"{slow / fast:.1f}×", size=19, weight="bold", va="center", color=BLUE)
        axes.text(1.04, y + 1.2, "sooner", size=9, va="center", color=MUTED)
    axes.set(xlim=(0, 1.25), ylim=(3.2 * len(found) - 1.4, -1.3))
    axes.axis("off")


def draw_growth(axes, growth: dict) -> None:
    """Seconds against images, the cache in memory and on disk."""
    for cache, name, colour, line in (("memory", "in memory", BLUE, "-o"), ("disk", "read from disk", ORANGE, "--s")):
        axes.plot(growth["images"], growth["seconds"][cache], line, color=colour, label=f"cache {name}", markersize=5)
    axes.set_title("Both phases as the data grow", weight="bold", size=11, loc="left")
    axes.set(xlabel="images", ylabel="seconds", xlim=(0, None), ylim=(0, None), xticks=growth["images"][1:])
    axes.legend(frameon=False, loc="lower right")
    first, last = growth["megabytes"]["disk"][0], growth["megabytes"]["disk"][-1]
    times = growth["images"][-1] // growth["images"][0]
    axes.annotate(
        f"memory, cache on disk: {first:.0f} MB at most,\nwith {times} times the data {last:.0f} MB",
        (0.03, 0.97), xycoords="axes fraction", va="top", size=9, color=MUTED,
        bbox={"facecolor": PAPER, "edgecolor": "none"},
    )  # fmt: skip


def draw(results: dict, out: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    found, growth = pairs(results), results.get("growth")
    machines = sorted({result["machine"] for result in results.values()})
    if len(machines) > 1:
        sys.exit(f"These results are of different machines ({'; '.join(machines)}). Measure all of them on one.")
    dates = sorted({result["date"] for result in results.values()})
    width = WIDTH_PIXELS / PIXELS_PER_INCH
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": "benchmarks", "font.size": 10}):
        height = max(1.05 * len(found), 3.0) + 0.7
        figure = Figure(figsize=(width, height), facecolor=PAPER, edgecolor=LINE, linewidth=2, layout="constrained")
        if growth and found:
            bars, lines = figure.subplots(1, 2, width_ratios=(1.25, 1))
        else:
            bars = lines = figure.add_subplot()
        if found:
            draw_pairs(bars, found)
        if growth:
            draw_growth(lines, growth)
        figure.get_layout_engine().set(rect=(0.015, 0.12, 0.97, 0.86))
        day = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        caption = f"{machines[0]}, {day}. EfficientNet-Lite0, 4,000 images of 96 pixels; tests/benchmarks says all."
        if pipeline := results.get("input_pipeline"):
            share = pipeline["graft"] / pipeline["bare"]
            caption += f"\nJPEG files of 500 x 375 are read at {share:.0%} of the rate of decoding and resizing alone."
        figure.text(0.015, 0.025, caption, size=8.5, color=MUTED)
        metadata = {"Date": None} if out.endswith(".svg") else None
        figure.savefig(out, dpi=PIXELS_PER_INCH, metadata=metadata, edgecolor=LINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="what the benchmarks wrote with --json")
    parser.add_argument("out", help="picture to write: .svg or .png")
    options = parser.parse_args()
    if pathlib.Path(options.out).suffix not in (".svg", ".png"):
        parser.error(f"{options.out}: the picture must end in .svg or .png")
    results = json.loads(pathlib.Path(options.results).read_text())
    known = ("two_phase", "second_run", "input_pipeline", "scratch", "growth")
    found = {name: results[name] for name in known if name in results}
    if not found:
        parser.error(f"{options.results} holds no results. Expected at least one of: {', '.join(known)}.")
    draw(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
