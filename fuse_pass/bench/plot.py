"""`bench --plot`: a bar per row, how many times faster fuse_pass is than `torch.compile`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fuse_pass.bench.results import STOCK, Result, Run
from fuse_pass.commands import timing
from fuse_pass.commands.errors import CommandError

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart; grey values differ too.
_TRAIN, _INFER, _INK = "#0072B2", "#E69F00", "#222222"
_ROW_INCHES, _MARGIN_INCHES, _WIDTH_INCHES = 0.24, 1.5, 10.0


def require(path: Path) -> None:
    """Checks that a chart can be drawn into a file.

    Raises:
        CommandError: the file is no .png, or matplotlib is missing.
    """
    if path.suffix != ".png":
        raise CommandError(f"--plot: expected a file name that ends in .png, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib, which is not installed: pip install 'fuse_pass[plot]'")


def draw(run: Run, path: Path) -> None:
    """Draws the rows of a run that torch.compile has a part in; a diamond marks its best setting."""
    require(path)
    results = [result for result in run.results if STOCK in result.time_by_ours]
    if not results:
        raise CommandError("--plot: expected rows with a ratio to torch.compile, got none; number rows have none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, _MARGIN_INCHES + _ROW_INCHES * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _bars(axes, results)
    axes.set_title("How many times faster fuse_pass is than torch.compile", fontsize=13, color=_INK, pad=26)
    axes.legend(handles=_legend(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    figure.supxlabel(timing.described(run.machine), fontsize=7, color=_INK)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, results: list[Result]) -> None:
    ratios = [result.time_by_ours[STOCK] for result in results]
    best = [result.time_by_ours[result.best_compiled or STOCK] for result in results]
    places = range(len(results))
    # On a logarithmic axis twice as fast and twice as slow are equally long; bars start at 1, as fast as torch.compile.
    axes.set_xscale("log")
    colours = [_TRAIN if result.train else _INFER for result in results]
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.72)
    for place, ratio, lowest in zip(places, ratios, best, strict=True):
        _label(axes, place, ratio, lowest)
        if lowest < ratio:
            axes.plot(lowest, place, "D", color=_INK, markersize=4)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_yticks(places, [result.name for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _scale(axes, min(0.8, *best), max(2.0, *ratios))


def _label(axes: Any, place: int, ratio: float, lowest: float) -> None:
    """The ratio beyond the end of its bar, and beyond the diamond where that is further out."""
    ahead = ratio >= 1
    axes.annotate(
        f"{ratio:.2f}×",
        (ratio if ahead else lowest, place),
        (5 if ahead else -5, 0),
        textcoords="offset points",
        va="center",
        ha="left" if ahead else "right",
        fontsize=8,
        color=_INK,
    )


def _scale(axes: Any, low: float, high: float) -> None:
    """Ticks at powers of two, labelled as ratios, with room for the numbers at both ends."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    left, right = low / 1.35, high * 1.4
    axes.set_xlim(left, right)
    powers = [2.0**exponent for exponent in range(-6, 11)]
    axes.xaxis.set_major_locator(FixedLocator([power for power in powers if left <= power <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=_TRAIN, label="training step"),
        Patch(color=_INFER, label="inference"),
        Line2D([], [], color=_INK, marker="D", linestyle="", markersize=4, label="against its best setting"),
    ]
