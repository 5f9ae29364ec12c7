"""Figures of an evaluation: reliability diagram, risk–coverage curves, histograms of confidence; matplotlib's Figure each."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ops.selective import risk_coverage_curve

RIGHT, WRONG = "#2a78b5", "#d1495b"  # told apart by colour-blind readers too
MOST_POINTS = 2000  # of a curve


def reliability_diagram(curve: np.ndarray, title: str = "", ece: float | None = None) -> Figure:
    """Accuracy against confidence by bin, with the gap between them, over the share of samples in each bin.

    Parameters
    ----------
    curve : array of shape (bins, 3)
        Count, correct and summed confidence of each bin of equal width (`Outcomes.curve`).
    title : str
    ece : float, optional
        Written under the legend, in percent.
    """
    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    count, correct, confidence = curve.T
    bins, filled = len(curve), count > 0
    edges, width = np.arange(bins) / bins, 1 / bins
    accuracy, mean = correct[filled] / count[filled], confidence[filled] / count[filled]
    upper.bar(edges[filled], accuracy, width, align="edge", color=(RIGHT, 0.6), edgecolor="white", label="accuracy")
    gap = {"facecolor": (WRONG, 0.15), "edgecolor": WRONG, "hatch": "///", "linewidth": 0.6}  # seen on the bar, too
    upper.bar(edges[filled], mean - accuracy, width, accuracy, align="edge", label="gap to confidence", **gap)
    upper.plot([0, 1], [0, 1], color="0.3", linewidth=1, linestyle="--")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=title)
    if ece is not None:
        upper.text(0.03, 0.78, f"ECE {100 * ece:.2f} %", transform=upper.transAxes)
    upper.legend(loc="upper left", frameon=False)
    lower.bar(edges, count / count.sum(), width, align="edge", color="0.6", edgecolor="white")
    lower.set(xlabel="confidence (largest probability)", ylabel="samples, share")
    return figure


def risk_coverage(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str = "") -> Figure:
    """Error among the most confident samples against the share of them; one line per name.

    `curves` maps a name to confidences (n,) and correctness (n,).
    """
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, (confidence, correct) in curves.items():
        coverage, risk = risk_coverage_curve(confidence, ~np.asarray(correct, bool))
        points = np.unique(np.linspace(0, len(risk) - 1, min(len(risk), MOST_POINTS)).astype(int))
        axes.plot(coverage[points], 100 * risk[points], linewidth=1.4, label=name)
    axes.set(xlim=(0, 1), xlabel="coverage, share of samples kept", ylabel="risk, % of these wrong", title=title)
    axes.set_ylim(bottom=0)
    _legend(axes, len(curves))
    return figure


def confidence_histogram(
    confidence: np.ndarray, correct: np.ndarray, title: str = "", label: str = "confidence", bins: int = 40
) -> Figure:
    """Histograms of the confidences of right and of wrong predictions, each scaled to the share of its own kind."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(min(0.0, float(confidence.min())), max(1.0, float(confidence.max())), bins + 1)
    for name, rows, color in (("right", correct, RIGHT), ("wrong", ~correct, WRONG)):
        if rows.any():
            share = np.full(int(rows.sum()), 100 / rows.sum())
            axes.hist(confidence[rows], edges, weights=share, color=color, alpha=0.55, label=f"{name} ({rows.sum():,})")
    axes.set(xlabel=label, ylabel="% of that kind", title=title)
    axes.legend(frameon=False)
    return figure


def box_plots(
    values: Mapping[str, Sequence[Sequence[float]]], positions: Sequence[str], xlabel: str, ylabel: str
) -> Figure:
    """Boxes at each position, one per name side by side: `values[name][i]` are the values at `positions[i]`."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    draw_boxes(figure.subplots(), values, positions, xlabel, ylabel)
    return figure


def draw_boxes(
    axes: Axes, values: Mapping[str, Sequence[Sequence[float]]], positions: Sequence[str], xlabel: str, ylabel: str
) -> None:
    """The boxes of `box_plots` on the axes given; from the quartiles, whiskers of at most 1.5 of their distance."""
    width = 0.8 / max(1, len(values))
    for number, (name, groups) in enumerate(values.items()):
        places = np.arange(len(groups)) + (number - (len(values) - 1) / 2) * width
        boxes = axes.boxplot(
            groups, positions=places, widths=0.8 * width, patch_artist=True, manage_ticks=False,
            medianprops={"color": "0.15"}, flierprops={"markersize": 3, "markeredgecolor": "0.5"},
        )  # fmt: skip
        for box in boxes["boxes"]:
            box.set(facecolor=(RIGHT, WRONG, *(f"C{n}" for n in range(2, 10)))[number], alpha=0.6)
        boxes["boxes"][0].set_label(name)
    axes.set_xticks(range(len(positions)), positions)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(y=0.12)  # room for the legend
    _legend(axes, len(values) if len(values) > 1 else 0)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """Lines through points: a name -> its x and y values."""
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.xaxis.get_major_locator().set_params(
        integer=all(float(x).is_integer() for xs, _ in series.values() for x in xs)
    )
    _legend(axes, len(series))
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def _legend(axes: Axes, entries: int) -> None:
    if entries:
        axes.legend(frameon=False, fontsize="small", ncols=1 + (entries > 8))
