"""The loss curve: a real picture when there is something to draw, no file otherwise, no lag in the running mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.metrics import FILE, Metrics
from train.plot import loss_curve, smooth


def write(folder: Path, rows: list[dict]) -> Path:
    metrics = Metrics(folder)
    for row in rows:
        metrics.log(row)
    metrics.close()
    return folder / FILE


def test_the_curve_is_a_png_of_readable_size_and_nothing_else_is_left(tmp_path: Path) -> None:
    from matplotlib.image import imread

    rows: list[dict] = [{"step": step, "loss": 5.0 / step + 1} for step in range(1, 100)]
    rows.append({"step": 99, "validation_loss": 1.1})
    path = write(tmp_path, rows)
    assert loss_curve(path, tmp_path / "loss.png")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[0] >= 400
    assert picture.shape[1] >= 800
    assert picture.std() > 0.01  # not a blank page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", FILE]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "loss": None}, {"step": 2, "lr": 1.0}]])
def test_no_picture_without_two_points(tmp_path: Path, rows: list[dict]) -> None:
    assert not loss_curve(write(tmp_path, rows), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200))
def test_the_running_mean_has_a_value_a_point_and_stays_within_the_values(values: list[float]) -> None:
    out = smooth(values)
    assert len(out) == len(values)
    assert all(min(values) - 1e-6 <= value <= max(values) + 1e-6 for value in out)


@given(st.integers(2, 300), st.floats(-5, 5), st.floats(-5, 5))
def test_the_running_mean_of_a_line_is_the_line(count: int, slope: float, start: float) -> None:
    line = [start + slope * index for index in range(count)]
    assert smooth(line) == pytest.approx(line, abs=1e-6)


def test_drawing_leaves_the_global_state_of_matplotlib_alone() -> None:
    code = "import sys; import train.plot, train.metrics; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
