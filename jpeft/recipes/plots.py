"""The pictures of runs: `loss.png`, and a sweep's `sweep.png`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.files import write_atomically
from jpeft.recipes.running_mean import RunningMean
from jpeft.storage import absolute

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GRAY = "#2f6db3", "#d9722b", "#8b8f96"

Points = list[tuple[int, float]]


def plot(lines: Sequence[Mapping[str, Any]], path: Path, metric: str, label: str) -> None:
    """Draws a run: the training loss with its running mean, and below the evaluations' metric and the learning rate.

    The title is the run's name, which is that of the picture's folder.

    Args:
        lines: those of `metrics.jsonl`.
        metric: a key of the evaluations' lines.
        label: its name in the picture.

    >>> plot(read_lines(run / "metrics.jsonl"), run / "loss.png", *chat.METRIC)  # doctest: +SKIP
    """
    image = io.BytesIO()
    draw(lines, absolute(path).parent.name, metric, label).savefig(image, dpi=130, format="png")
    write_atomically(path, image.getvalue())


def draw(lines: Sequence[Mapping[str, Any]], name: str, metric: str, label: str) -> Figure:
    """The figure that `plot` saves; ``name`` is its title.

    >>> lines = [{"step": 0, "eval_accuracy": 0.5}, {"step": 1, "loss": 0.7, "lr": 0.1}]
    >>> [axes.get_xlabel() for axes in draw(lines, "first", "eval_accuracy", "test accuracy").axes]
    ['', 'step', '']
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")  # not pyplot, which keeps state and opens windows
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(name, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _draw_loss(upper, points(lines, "loss"))
    _draw_metric(lower, points(lines, metric), label)
    _draw_rate(lower, points(lines, "lr"))
    lower.set_xlabel("step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_sweep(lines: Sequence[Mapping[str, Any]], labels: Sequence[str], kept: int, path: Path) -> None:
    """Draws a sweep: the running mean of every member's training loss, and the evaluations of all.

    Args:
        lines: those of `metrics.jsonl`, each with the index of its `member`.
        labels: the members' names.
        kept: the index of the member that is kept, whose line is the thick one.

    >>> plot_sweep(read_lines(run / "metrics.jsonl"), ["lr=0.001", "lr=0.01"], 0, run / "sweep.png")  # doctest: +SKIP
    """
    image = io.BytesIO()
    draw_sweep(lines, labels, kept, absolute(path).parent.name).savefig(image, dpi=130, format="png")
    write_atomically(path, image.getvalue())


def draw_sweep(lines: Sequence[Mapping[str, Any]], labels: Sequence[str], kept: int, name: str) -> Figure:
    """The figure that `plot_sweep` saves; ``name`` is its title.

    >>> lines = [{"step": 1, "loss": 0.7, "member": 0}, {"step": 1, "eval_loss": 0.6, "member": 0}]
    >>> [axes.get_ylabel() for axes in draw_sweep(lines, ["lr=0.1"], 0, "first").axes]
    ['training loss', 'evaluation loss']
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(name, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for member, label in enumerate(labels):
        own = [line for line in lines if line.get("member") == member]
        style = {"color": colormaps["viridis"](0.9 * member / max(1, len(labels) - 1))}
        style |= {"linewidth": 3.0 if member == kept else 1.2, "label": f"{label} (kept)" if member == kept else label}
        steps, losses = _columns(points(own, "loss"))
        upper.plot(steps, running_mean(losses), **style)
        lower.plot(*_columns(points(own, "eval_loss")), "o-", markersize=4, **style)
    for axes, label in ((upper, "training loss"), (lower, "evaluation loss")):
        _style(axes)
        axes.set_ylabel(label)
    upper.legend(frameon=False, fontsize=8, ncols=2)
    lower.set_xlabel("step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    return figure


def points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    """The steps at which a metric was logged as a number, and its values.

    >>> points([{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": None}], "loss")
    [(1, 1.5)]
    """
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _columns(pairs: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]


def running_mean(values: Sequence[float]) -> list[float]:
    """The running mean after each value.

    >>> [round(x, 3) for x in running_mean([1.0, 0.0, 0.0])]
    [1.0, 0.444, 0.262]
    """
    mean = RunningMean(len(values))
    return [mean.add(value) for value in values]


def _draw_loss(axes: Any, losses: Points) -> None:
    steps, values = _columns(losses)
    axes.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1, label="training loss")
    axes.plot(steps, running_mean(values), color=_BLUE, linewidth=2, label="its running mean")
    _style(axes)
    _legend(axes, axes.lines, "left")


def _draw_metric(axes: Any, scores: Points, label: str) -> None:
    axes.plot(*_columns(scores), "o-", color=_ORANGE, linewidth=2, markersize=5, label=label)
    _style(axes)
    if scores:
        step, value = scores[-1]
        axes.annotate(
            f"{value:.4g}", (step, value), (-6, 8), textcoords="offset points", ha="right", color=_ORANGE, fontsize=9
        )
    axes.margins(y=0.2)
    _legend(axes, axes.lines, "left")


def _draw_rate(axes: Any, rates: Points) -> None:
    twin = axes.twinx()
    twin.plot(*_columns(rates), color=_GRAY, linewidth=1.2, linestyle=(0, (4, 2)), label="learning rate")
    twin.spines[["top", "left"]].set_visible(False)
    twin.spines["right"].set_color(_GRAY)
    twin.tick_params(colors=_GRAY, labelsize=9)
    twin.yaxis.set_major_formatter(
        lambda rate, _: f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-") if rate else "0"
    )
    twin.set_ylim(bottom=0)
    _legend(twin, twin.lines, "right")


def _style(axes: Any) -> None:
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _legend(axes: Any, lines: Sequence[Any], side: str) -> None:
    """A legend above the axes, where no line is."""
    x = {"left": 0.0, "right": 1.0}[side]
    axes.legend(
        handles=list(lines), loc=f"lower {side}", bbox_to_anchor=(x, 1.0), ncols=len(lines), frameon=False, fontsize=9,
        borderaxespad=0.2,
    )  # fmt: skip
