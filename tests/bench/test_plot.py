"""The chart of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fuse_pass.bench import plot
from fuse_pass.bench.results import Run
from fuse_pass.commands.errors import CommandError
from tests.bench import sample


def test_chart_is_a_png_with_a_bar_per_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "chart.png"
    plot.draw(sample.run(), file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_bars_start_at_1_and_carry_their_ratios() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plot._bars(axes, sample.run().results[:3])
    assert [text.get_text() for text in axes.texts] == ["16.00×", "2.00×", "0.90×"]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (1, pytest.approx(15)),
        (1, pytest.approx(1)),
        (1, pytest.approx(-0.1)),
    ]
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == [pytest.approx(25 / 24)], "only where another setting is faster than torch.compile as it is"
    low, high = axes.get_xlim()
    assert low < 0.9
    assert high > 16


def test_nothing_to_draw() -> None:
    pytest.importorskip("matplotlib")
    run = sample.run()
    with pytest.raises(CommandError, match=r"expected rows with a ratio to torch.compile, got none"):
        plot.draw(Run(run.machine, {}, 1.0, run.results[3:]), Path("chart.png"))


def test_file_name_and_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match=r"expected a file name that ends in .png, got 'chart.svg'"):
        plot.require(Path("chart.svg"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"not installed: pip install 'fuse_pass\[plot\]'"):
        plot.require(Path("chart.png"))
