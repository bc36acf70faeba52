"""The predicted time of a program, by hand."""

import pytest

from moe_jax.planning import roofline
from moe_jax.planning.roofline import REST, Prediction, Rates, predict
from moe_jax.planning.target import Target, load_target
from moe_jax.system.hlo import Dot
from moe_jax.system.hlo_kernels import Kernel

RATES = Rates(bytes=1e9, float32=1e12, tf32=2e12, narrow=4e12, launch=1e-6)


def dot(dtype: str, precision: str = "default", flops: int = 8_000_000) -> Dot:
    return Dot("", (), (), (), dtype, dtype, precision, flops, 1)


def kernel(name: str, read: int, written: int, *dots: Dot, runs: int = 1) -> Kernel:
    return Kernel(name, "fusion", frozenset(), read, written, dots, runs)


@pytest.mark.parametrize(
    ("found", "microseconds"),
    [
        (kernel("", 600, 400), 1 + 1),  # memory: 1,000 bytes at 1 GB/s
        (kernel("", 600, 400, runs=5), 5 * 2),
        (kernel("", 0, 0), 1),
        (kernel("", 0, 0, dot("f32", "highest")), 8 + 1),
        (kernel("", 0, 0, dot("f32")), 4 + 1),
        (kernel("", 0, 0, dot("bf16")), 2 + 1),
        (kernel("", 0, 0, dot("f16"), dot("bf16")), 4 + 1),
        (kernel("", 3000, 0, dot("bf16")), 3 + 1),  # the longer of memory and products
    ],
)
def test_a_kernel_takes_the_longer_of_memory_and_products_and_its_launch(found: Kernel, microseconds: float) -> None:
    assert RATES.seconds(found) == pytest.approx(1e-6 * microseconds)


def test_a_program_is_the_sum_of_its_kernels_by_part() -> None:
    found = predict(
        [
            kernel("jit(step)/transpose(jvp(head))/while/body/dot_general", 10**6, 0, runs=3),
            kernel("jit(step)/jvp(ffn)/experts/dot_general", 0, 2 * 10**6),
            kernel("jit(step)/jvp(ffn)/router/dot_general", 0, 0),
            kernel("jit(step)/jvp()/gather", 0, 0),
        ],
        RATES,
    )
    assert (found.kernels, found.traffic_gb) == (6, pytest.approx(5e-3))
    assert found.milliseconds == pytest.approx(5 + 6e-3)
    assert found.traffic_by_part["head and loss"] == pytest.approx(3e-3)
    assert found.milliseconds_by_part["experts"] == pytest.approx(2 + 1e-3)
    assert found.milliseconds_by_part["routing"] == found.milliseconds_by_part[REST] == pytest.approx(1e-3)
    assert found.milliseconds_by_part["optimizer"] == 0


@pytest.mark.parametrize(
    ("gpu", "float32", "narrow"),
    [("rtx3050-4gb", 6.144, 12.288), ("rtx3060-12gb", 12.737536, 25.475072), ("quadro-t1000-4gb", 2.60736, 2.60736)],
)
def test_the_rates_of_the_described_cards(gpu: str, float32: float, narrow: float) -> None:
    """RTX 3050 Laptop: 16 x 128 cores x 2 x 1.5 GHz are 6.144 TFLOP/s. Its tensor cores do twice that."""
    rates = Rates.of(load_target(gpu))
    assert rates.float32 == pytest.approx(0.7 * float32 * 1e12)
    assert rates.narrow == pytest.approx(0.7 * narrow * 1e12)
    assert rates.bytes == pytest.approx(0.8 * load_target(gpu).number("memory_bandwidth"))


def card(capability: str, name: str = "a card") -> Target:
    major, minor = capability.split(".")
    text = f"cuda_compute_capability {{ major: {major} minor: {minor} }} core_count: 10 fpus_per_core: 64"
    text += " clock_rate_ghz: 1 memory_bandwidth: 100"
    return Target("card", f'{text} device_description_str: "{name}"')


@pytest.mark.parametrize(
    ("capability", "name", "tf32", "narrow"),
    [
        ("6.1", "GTX 1080", 64, 64),
        ("7.5", "GTX 1650", 64, 64),
        ("7.5", "T4", 64, 256),
        ("8.0", "A100", 512, 1024),
        ("8.9", "RTX 4090", 128, 256),
        ("9.0", "H100", 1024, 2048),
    ],
)
def test_the_multiply_adds_of_a_clock(capability: str, name: str, tf32: int, narrow: int) -> None:
    rates = Rates.of(card(capability, name))
    of_one = 0.7 * 2 * 10 * 1e9
    assert (rates.tf32 / of_one, rates.narrow / of_one) == (pytest.approx(tf32), pytest.approx(narrow))


def test_a_prediction_in_words_and_as_json() -> None:
    found = Prediction(1500, 40.0, 500.0, {"experts": 7.0}, {"experts": 500.0})
    said = roofline.in_words(found, 8192, 3600)
    assert "predicted, nothing measured: 500 ms a step, 16,384 tokens/s, 30.0 min for 3,600 steps" in said
    assert "1,500 kernels, 40.0 GB read and written: experts 500 ms (7.0 GB)" in said
    assert roofline.summary(found, 8192) == {
        "kernels": 1500,
        "traffic_gb": 40.0,
        "predicted_step_ms": 500.0,
        "predicted_tokens_per_second": 16384,
    }
    assert set(roofline.summary(None, 8192).values()) == {None}
