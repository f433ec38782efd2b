"""The picture of a run: `loss.png`."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.files import write_atomically


def plot(lines: Sequence[Mapping[str, Any]], path: Path, metric: str, label: str) -> None:
    """Plots the training loss, its running mean, and a metric of the evaluations.

    Args:
        metric: a key of the evaluations' lines.
        label: its name in the plot.

    >>> plot(read_lines(run / "metrics.jsonl"), run / "loss.png", *chat.METRIC)  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    scores = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot, which keeps state and opens windows
    FigureCanvasAgg(figure)
    left = figure.add_subplot(xlabel="step", ylabel="training loss")
    left.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
    mean = itertools.accumulate((loss for _, loss in losses), lambda mean, loss: 0.95 * mean + 0.05 * loss)
    left.plot([step for step, _ in losses], list(mean), color="tab:blue", label="training loss, running mean")
    right = left.twinx()
    right.set_ylabel(label)
    right.plot(*zip(*scores, strict=True), "o-", color="tab:orange", label=label)
    left.legend(handles=[*left.lines[1:], *right.lines], loc="center right", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_atomically(path, image.getvalue())
