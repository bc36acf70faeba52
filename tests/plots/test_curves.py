"""What a picture shows of the records: which curves, lines, limits and names. No picture is written."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from moe_jax.config import UserError
from moe_jax.plots import COLOURS, _Metrics, load_figure, run_figures


def run(folder: Path, name: str, *, summary: dict[str, Any] | None = None, **values: Any) -> Path:
    """A run with two training records and one of validation. `values` are added to each training record."""
    path = folder / name
    path.mkdir()
    records = [{"step": step, "split": "train", "loss": 3.0 - step} | values for step in (1, 2)]
    records.append({"step": 2, "split": "val", "loss": 0.5, "bits_per_byte": 0.25})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "summary.json").write_text(json.dumps(summary or {}))
    return path


MOE = {"lr": 0.1, "tokens_per_second": 5000, "balance_loss": 1.2, "drop_fraction": 0.5, "load": [[0.5, 0.5]] * 3}


def labels(figure: Any) -> list[str]:
    return [str(line.get_label()) for line in figure.axes[0].get_lines()]


def legend(figure: Any) -> list[str] | None:
    found = figure.axes[0].get_legend()
    return None if found is None else [text.get_text() for text in found.get_texts()]


def test_a_figure_without_data_is_left_out(tmp_path: Path) -> None:
    assert set(run_figures([run(tmp_path, "dense")])) == {"loss", "bits_per_byte"}
    everything = {"loss", "bits_per_byte", "learning_rate", "throughput", "balance", "drops", "evenness", "load"}
    assert set(run_figures([run(tmp_path, "moe", **MOE)])) == everything
    assert set(run_figures([tmp_path / "moe", tmp_path / "dense"])) == everything - {"load"}


def test_one_run_is_the_title_and_several_are_the_legend(tmp_path: Path) -> None:
    a, b = run(tmp_path, "a", **MOE), run(tmp_path, "b", **MOE)
    one, two = run_figures([a]), run_figures([a, b])
    titles = {name: figure.axes[0].get_title("left") for name, figure in one.items() if name != "load"}
    assert titles["loss"] == "Loss: a"
    assert titles["evenness"] == "Evenness of the load: a"
    assert two["loss"].axes[0].get_title("left") == "Loss"
    assert legend(one["loss"]) == ["a, training", "a, validation subset"]
    for name in ("learning_rate", "throughput", "balance", "drops", "evenness", "bits_per_byte"):
        assert legend(one[name]) is None, name
        assert legend(two[name]) == ["a", "b"], name
    assert [line.get_color() for line in two["drops"].axes[0].get_lines()] == list(COLOURS[:2])
    assert [line.get_color() for line in two["evenness"].axes[0].get_lines()] == list(COLOURS[:2])


def test_each_floor_is_one_line(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, n, summary={"entropy_floor_bits_per_byte": f}) for n, f in (("a", 0.5), ("b", 0.4), ("c", 0.5))
    ]
    figure = run_figures(runs)["bits_per_byte"]
    assert [list(line.get_ydata()) for line in figure.axes[0].get_lines()[3:]] == [[0.4, 0.4], [0.5, 0.5]]
    assert labels(figure)[3] == "entropy of the whole validation text, 0.4000"


def test_the_axis_of_bits_shows_the_curve_above_its_floor(tmp_path: Path) -> None:
    """Without its first point, which belongs to a model that has hardly learned."""
    path = run(tmp_path, "a", summary={"entropy_floor_bits_per_byte": 0.2})
    values = {1: 8.0, 3: 0.5, 4: 0.3, 5: 0.4}
    records = [json.dumps({"step": n, "split": "val", "bits_per_byte": bits}) for n, bits in values.items()]
    train = json.dumps({"step": 1, "split": "train", "loss": 2.0})
    (path / "metrics.jsonl").write_text("\n".join([train, *records, ""]))
    figure = run_figures([path])["bits_per_byte"]
    assert figure.axes[0].get_ylim() == pytest.approx((0.97 * 0.2, 1.03 * 0.5))


def test_values_that_are_null_are_left_out(tmp_path: Path) -> None:
    path = run(tmp_path, "a")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "train", "loss": null}\n{"step": 4, "split": "train", "loss": 0}\n')
    assert _Metrics(path).series("train", "loss") == ([1, 2, 4], [2, 1, 0])


def test_a_run_without_training_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "val", "loss": 1}\n')
    with pytest.raises(UserError, match=rf"^--run {tmp_path}: no metrics\.jsonl with training records there"):
        run_figures([tmp_path])


def test_the_load_has_a_panel_for_each_layer() -> None:
    """Three experts: a third is the fair share, at which the colour is white."""
    values = np.array([[[0.5, 0.5, 0], [1, 0, 0]], [[0.25, 0.25, 0.5], [0, 1, 0]]])
    figure = load_figure(([10, 30], values))
    first, second, bar = figure.axes
    for layer, axes in enumerate((first, second)):
        (image,) = axes.get_images()
        np.testing.assert_allclose(image.get_array(), 3 * values[:, layer].T)
        assert (image.norm.vmin, image.norm.vmax) == (0, 2)
        assert image.get_extent() == [10, 30, 2.5, -0.5]
        assert axes.get_ylabel() == f"layer {layer}"
    entropy = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5)) / math.log(3)
    assert first.get_title("right") == f"evenness at the end {entropy:.3f}"
    assert second.get_title("right") == "evenness at the end 0.000"
    assert (first.get_xlabel(), second.get_xlabel()) == ("", "step")
    assert bar.get_ylabel() == "times the fair share"
    assert figure.get_size_inches().tolist() == [8, pytest.approx(1.2 + 1.5 * 2)]
