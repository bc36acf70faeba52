"""Which matrix units a device has."""

from types import SimpleNamespace

import pytest

from moe_jax.model.precision import Card, choose_policy


def device(name: str, capability: str | None, platform: str = "gpu") -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=name, compute_capability=capability)


@pytest.mark.parametrize(
    ("name", "capability", "tensor_cores", "compute"),
    [
        ("NVIDIA GeForce GTX 1080", "6.1", False, "float32"),
        ("Tesla V100-SXM2-16GB", "7.0", True, "float16"),
        ("Tesla T4", "7.5", True, "float16"),
        ("NVIDIA GeForce RTX 2060", "7.5", True, "float16"),
        ("Quadro RTX 4000", "7.5", True, "float16"),
        ("NVIDIA GeForce GTX 1650", "7.5", False, "float32"),
        ("NVIDIA GeForce GTX 1660 Ti", "7.5", False, "float32"),
        ("Quadro T1000", "7.5", False, "float32"),
        ("NVIDIA T1000 8GB", "7.5", False, "float32"),
        ("NVIDIA T600 Laptop GPU", "7.5", False, "float32"),
        ("NVIDIA GeForce MX450", "7.5", False, "float32"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", "8.6", True, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "9.0", True, "bfloat16"),
    ],
)
def test_the_precision_is_the_narrowest_that_the_matrix_units_take(
    name: str, capability: str, tensor_cores: bool, compute: str
) -> None:
    card = Card.of(device(name, capability))
    assert card == Card("gpu", name, float(capability))
    assert (card.tensor_cores, card.bfloat16_units) == (tensor_cores, compute == "bfloat16")
    policy = choose_policy("auto", device(name, capability))
    assert policy.compute == compute
    assert name in policy.reason


def test_a_device_without_a_compute_capability_has_no_tensor_cores() -> None:
    for found in (
        device("cpu", None, "cpu"),
        device("TPU v5", "", "tpu"),
        device("AMD Instinct MI300X", "gfx942"),
        SimpleNamespace(platform="x", device_kind="y"),
    ):
        card = Card.of(found)
        assert card.capability is None
        assert (card.tensor_cores, card.bfloat16_units) == (False, False)
