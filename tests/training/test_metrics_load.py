"""The load of the experts in TensorBoard: a histogram whose bars are the experts."""

from pathlib import Path

import pytest

from moe_jax.training.metrics import add_load


class Writer:
    def __init__(self) -> None:
        self.written: dict = {}

    def add_histogram_raw(self, **values: object) -> None:
        self.written = values


def test_each_expert_is_a_bar() -> None:
    """Shares 1/2, 1/4, 1/4: bars end at 1, 2 and 3, and the mean lies at 0.5/2 + 1.5/4 + 2.5/4 = 1.25."""
    writer = Writer()
    add_load(writer, "load/layer_0", [0.5, 0.25, 0.25], 7)
    assert writer.written["bucket_limits"] == [1.0, 2.0, 3.0]
    assert writer.written["bucket_counts"] == [0.5, 0.25, 0.25]
    assert writer.written["sum"] == pytest.approx(1.25)
    assert (writer.written["tag"], writer.written["global_step"]) == ("load/layer_0", 7)


def test_a_real_writer_takes_it(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        add_load(writer, "load/layer_0", [0.5, 0.25, 0.25], 7)
    assert any(path.stat().st_size > 0 for path in tmp_path.iterdir())
