"""Lines, history and chart of a run."""

from __future__ import annotations

import re

import pytest

from mlx_diffgemma.chart import Chart, decade_axis, linear_axis
from mlx_diffgemma.train.events import Evaluation, Finished, Report, Saved
from mlx_diffgemma.train.progress import History, duration, line_of


def report(step: int, loss: float = 1.5, encoder: float = 0.5) -> Report:
    return Report(step, loss, loss - encoder, encoder, 1e-4, 0.3, 1000, 1234.5, 4.0, 12.34, 600.0)


def test_lines():
    assert line_of(report(10), 100) == (
        "step 10/100 · loss 1.5000 (canvas 1.0000, encoder 0.5000) · lr 1.00e-04 · 1,234 tokens/s "
        "· 12.34 GB · 10 min left"
    )
    assert "canvas" not in line_of(report(10, encoder=0.0), 100)
    evaluation = Evaluation(20, 0.75, 0.0, {0.2: 0.5, 1.0: 1.0}, 0.125)
    assert line_of(evaluation, 100) == (
        "step 20/100 · held out: loss 0.7500 (by noise 0.2: 0.5000, 1: 1.0000) "
        "· exact answers 12.5%"
    )
    assert line_of(Evaluation(20, float("nan"), 0.0), 100) is None
    assert line_of(Saved(20, "x"), 100) is None
    assert line_of(Finished(100, 45.2), 100) == "100 steps done, 45 s in this sitting"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (7320, "2 h 02 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_history_over_several_sittings(tmp_path):
    history = History(tmp_path, resume=False)
    assert history.draw() is None
    for step in (10, 20, 30):
        history.add(report(step, loss=float(step)))
    history.add(Evaluation(20, 7.0, 0.0, {0.5: 7.0}))
    history.add(Saved(20, "x"))
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "rep')  # killed here
        file.write("\n")
    again = History(tmp_path, resume=True)
    again.add(report(30, loss=5.0))
    losses = [(r["step"], r["loss"]) for r in again.records() if r["event"] == "report"]
    assert losses == [(10, 10.0), (20, 20.0), (30, 5.0)]
    picture = again.draw().read_text()
    lines = re.findall(r'<polyline points="([^"]*)"', picture)
    assert [len(line.split()) for line in lines] == [3, 1]
    assert picture.count("<circle") == 1
    assert History(tmp_path, resume=False).records() == []


def test_axes_cover_their_values_and_charts_keep_within_the_frame():
    for low, high in ((0, 1000), (0.0, 0.0313), (3.2, 3.2), (-5, 17)):
        axis = linear_axis("x", low, high)
        assert axis.low <= low <= high <= axis.high
        assert axis.low < axis.high
        assert 2 <= len(axis.marks) <= 8
    chart = Chart(linear_axis("x", 0, 10), decade_axis("y", -4.5, -1.2))
    assert chart.x(0) < chart.x(10) <= 720
    assert 0 <= chart.y(-1) < chart.y(-5) <= 440
