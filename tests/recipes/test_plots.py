"""The picture of a run: what is drawn, and that nothing lies on it."""

import math

import numpy as np
import pytest

from jpeft.recipes.plots import draw, plot, running_mean
from jpeft.recipes.tasks import find

CHAT = find("chat").METRIC


def lines_of(steps):
    lines = [{"step": 0, "eval_loss": 2.5, "eval_perplexity": 12.2}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 1 + math.exp(-step / 20) + 0.2 * math.sin(step), "lr": 1e-3 / step})
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 1.0, "eval_perplexity": 4 + 8 / step})
    return lines


def data(axes):
    return {line.get_label(): [tuple(map(float, p)) for p in line.get_xydata()] for line in axes.lines}


def test_two_panels_show_all_that_was_logged():
    lines = lines_of(60)
    figure = draw(lines, "smollm2-lora-1", *CHAT)
    upper, lower, rate = figure.axes
    losses = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    assert figure.get_suptitle() == "smollm2-lora-1" and lower.get_xlabel() == "step"
    assert data(upper)["training loss"] == losses
    assert data(lower) == {CHAT[1]: [(x["step"], x["eval_perplexity"]) for x in lines if "eval_perplexity" in x]}
    assert data(rate) == {"learning rate": [(x["step"], x["lr"]) for x in lines if "lr" in x]}
    assert [text.get_text() for text in lower.texts] == ["4.133"]


@pytest.mark.parametrize("steps", [2, 60])
def test_legends_lie_beside_the_lines_and_each_other(steps):
    figure = draw(lines_of(steps), "smollm2-lora-1", *CHAT)
    figure.draw_without_rendering()
    boxes = [axes.get_legend().get_window_extent() for axes in figure.axes]
    boxes.append(figure._suptitle.get_window_extent())
    assert not any(box.overlaps(axes.bbox) for box in boxes for axes in figure.axes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.p0, box.p1))


def test_a_running_mean_is_within_what_it_averages_and_steadier():
    rng = np.random.default_rng(0)
    values = 1 + rng.normal(size=400)
    mean = np.array(running_mean(list(values)))
    assert mean[0] == values[0] and np.all(mean <= np.maximum.accumulate(values) + 1e-9)
    assert np.std(mean[50:]) < 0.4 * np.std(values)
    assert running_mean([2.0] * 30) == pytest.approx([2.0] * 30)


def test_the_file_is_a_picture_also_of_a_run_without_a_finite_loss(tmp_path):
    plot([{"step": 0, "eval_perplexity": None}, {"step": 1, "loss": None, "lr": 0.1}], tmp_path / "loss.png", *CHAT)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
