"""`doctor --gpu`: what it finds missing, and what it says of a card. The card is invented here."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.config import RunConfig
from moe_jax.planning import card
from moe_jax.planning.plans import KnownCard, known_card
from moe_jax.system import environment, machine
from moe_jax.training.plan import Plan, values_of

WHOLE = {"jax-cuda12-plugin": "0.12.0", "nvidia-cudnn-cu12": "9.2"}
DRIVER = ["RTX 3050", "560.35"]


@pytest.mark.parametrize(
    ("system", "driver", "packages", "platforms", "missing"),
    [
        ("linux", [*DRIVER, "6.1", "3000"], WHOLE, "", {"capability": r"has 6.1: cuDNN needs 7.5 \(Turing\) or newer"}),
        (
            "linux",
            [*DRIVER, "8.6", "900"],
            WHOLE,
            "",
            {"free memory": "900 MiB are free, and a small model needs 1,024"},
        ),
        ("linux", DRIVER, WHOLE, "", {}),
        ("linux", DRIVER, WHOLE, "cuda,cpu", {}),
        ("win32", None, {}, "", {"system": "install WSL 2", "driver": "525 or newer", "CUDA": "--extra cuda12"}),
        ("linux", ["RTX 3050", "470.1"], WHOLE, "", {"driver": "470.1 for RTX 3050: cuda12 needs 525 or newer"}),
        ("linux", DRIVER, {"jax-cuda13-plugin": "1", "nvidia-cudnn-cu13": "9"}, "", {"driver": "580 .* use cuda12"}),
        ("linux", DRIVER, {"jax-cuda12-plugin": "0.12.0"}, "", {"CUDA": "libraries are not: .*--extra cuda12"}),
        ("linux", DRIVER, WHOLE, "cpu", {"JAX_PLATFORMS": "JAX_PLATFORMS=cpu hides the card: unset it"}),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    system: str,
    driver: list[str] | None,
    packages: dict[str, str],
    platforms: str,
    missing: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    facts = dict(zip(("name", "driver_version", "compute_cap", "memory.free"), driver or [], strict=False))
    monkeypatch.setattr(card, "ask_nvidia_smi", lambda *f: [facts[n] for n in f] if facts.keys() >= set(f) else None)
    monkeypatch.setattr(card, "_version", lambda name: packages.get(name, ""))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    found = list(card.needs())
    assert [f.what for f in found if not f.good] == list(missing)
    for name, said in missing.items():
        assert re.search(said, {f.what: f.detail for f in found}[name])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card that multiplies at 6.144 TFLOP/s. Its memory is the processor's."""
    monkeypatch.setattr(machine, "READ_BYTES", 4096)
    monkeypatch.setattr(machine, "matmul_rate", lambda dtype, size: 6.144e12)
    monkeypatch.setattr(card, "ask_nvidia_smi", lambda *_: ["900", "4096"])
    return SimpleNamespace(
        platform="gpu",
        device_kind=known_card("rtx3050-4gb").device_kind,
        compute_capability="8.6",
        memory_stats=lambda: {"bytes_limit": 3000 * 2**20},
    )


def test_a_card_is_measured_beside_its_maker_s_figures(device: Any) -> None:
    found = {f.what: f.detail for f in card.reached(device, "seed-158m") if f.good}
    assert found["card"] == "NVIDIA GeForce RTX 3050 Laptop GPU, compute capability 8.6"
    assert found["computes in"].endswith("compute capability 8.6 has bfloat16 units)")
    assert found["memory"] == "JAX has taken 3,000 MiB; beside it 900 of 4096 MiB are free"
    assert found["products"] == "6.14 TFLOP/s in bfloat16, 50% of its maker's 12.3"
    assert found["bandwidth"].endswith(" of its maker's 192.0")


@pytest.mark.parametrize(
    ("precision", "mib", "good", "said"),
    [
        (
            "bfloat16",
            2000,
            True,
            "fits, by the plan for NVIDIA GeForce RTX 3050 Laptop GPU: 32 sequences, adamw-8bit, 2,000 of 2,550",
        ),
        ("bfloat16", 2600, False, "no recorded plan in bfloat16 fits 2,550 MiB"),
        ("float32", 2000, False, "no recorded plan in bfloat16 fits"),
    ],
)
def test_a_preset_fits_by_its_recorded_plans(
    precision: str, mib: float, good: bool, said: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """85 % of the 3,000 MiB that JAX has taken are 2,550. A plan is for the card that it was made for and for cards
    with more memory that compute in the same precision."""

    def recorded(config: RunConfig, target: KnownCard) -> tuple[list[Plan], str]:
        whole = config.override({("train", "batch_size"): 32, ("train", "grad_accum"): 1})
        plan = Plan(values_of(whole), precision, 1, {"step": mib, "decoding": 1})
        return ([plan], "1.0") if target.name == "rtx3050-4gb" else ([], "")

    monkeypatch.setattr(card, "recorded", recorded)
    found = {f.what: f for f in card.reached(device, "seed-158m")}
    assert (found["seed-158m"].good, found["seed-158m"].detail.startswith(said)) == (good, True)
    assert found["train with"].detail == "uv run --extra cuda12 train.py --preset seed-158m"


def test_a_processor_is_no_card() -> None:
    (found,) = card.reached(SimpleNamespace(platform="cpu", device_kind="cpu"), "nano")
    assert (found.good, "sees no card" in found.detail) == (False, True)


def test_the_command_says_all_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "ask_nvidia_smi", lambda *_: None)
    monkeypatch.setattr(environment, "prepare_environment", lambda *_: pytest.fail("jax would be imported"))
    assert main(run_command, ["doctor", "--gpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "  missing  " in line][:2] == ["driver", "CUDA"]
    for argv in (["doctor"], ["doctor", "--gpu", "--run", "x"]):
        assert main(run_command, argv) == 2
        assert capsys.readouterr().err.startswith("error: --run")
