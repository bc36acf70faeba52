"""Pictures of runs: what is drawn are the numbers of metrics.jsonl."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from moe_jax.cli.main import run_command
from moe_jax.plots import run_figures, save_figures
from tests.support import saved_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run.save_run(tmp_path_factory.mktemp("plots"))


def lines(figure) -> list[tuple[str, list[float], list[float]]]:
    return [(str(x.get_label()), list(x.get_xdata()), list(x.get_ydata())) for x in figure.axes[0].get_lines()]


def test_curves_are_the_records(folder: Path) -> None:
    figures = run_figures([folder])
    assert lines(figures["loss"]) == [
        ("run, training", [10, 20, 30, 40], [4, 3, 2, 1]),
        ("run, validation subset", [40], [1.2]),
    ]
    (bits, floor) = lines(figures["bits_per_byte"])
    assert bits == ("run", [40], [1.5])
    assert floor[0] == "entropy of the whole validation text, 0.5000"
    assert floor[2] == [0.5, 0.5]
    # Even in layer 0; in layer 1 from step 30 on one expert takes all.
    assert lines(figures["evenness"]) == [("run", [10, 20, 30, 40], [1, 1, 0.5, 0.5])]
    images = [axes.get_images()[0].get_array() for axes in figures["load"].axes[:2]]
    np.testing.assert_allclose(images[0], np.ones((4, 4)))
    np.testing.assert_allclose(images[1][0], [1, 1, 4, 4])  # times the fair share


@pytest.mark.slow
def test_the_same_run_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    first, second = (save_figures(run_figures([folder]), tmp_path / name) for name in ("a", "b"))
    assert {p.suffix for p in first} == {".png", ".svg"}
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_the_command_writes_into_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plot", "--run", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert str(folder / "report" / "loss.svg") in printed
    assert all(Path(line).is_file() for line in printed)
