"""Descriptions of GPUs, and the memory of programs that are compiled for them. The compiler is invented here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import ConfigError, UserError
from moe_jax.model.precision import choose_policy
from moe_jax.planning import device_memory
from moe_jax.planning.device_memory import Memory, compile_for_gpu, measured
from moe_jax.planning.target import GPU_TARGETS, Target, load_target
from moe_jax.system.environment import MIB
from tests.planning.invented import memory, target


@pytest.mark.parametrize("path", sorted(GPU_TARGETS.glob("*.txtpb")), ids=lambda p: p.stem)
def test_every_target_says_what_it_is_and_where_that_comes_from(path: Path) -> None:
    target = load_target(path.stem)
    gigabytes = int(path.stem.rpartition("-")[2].removesuffix("gb"))
    assert 0.9 * gigabytes * 2**30 < target.memory <= gigabytes * 2**30, "what a card reports, not what is on its box"
    assert 7 < float(target.compute_capability) < 13
    assert "Source: " in target.text
    reason = str(choose_policy("auto", target))
    older = {"quadro-t1000-4gb": "float32", "rtx2060-6gb": "float16"}  # without bfloat16 units
    assert reason.startswith(older.get(path.stem, "bfloat16"))
    assert target.device_kind in reason


def test_the_budget_of_the_4_gb_cards_by_hand() -> None:
    """3,951,369,912 bytes are 3,768.3 MiB; 75 % of that is 2,826.2, and 85 % of that 2,402.3."""
    assert [load_target(gpu).budget for gpu in ("rtx3050-4gb", "quadro-t1000-4gb")] == pytest.approx(
        [2402.3] * 2, abs=0.05
    )


def test_the_compute_capability_is_read_from_its_own_block() -> None:
    """The text leaves out a minor number of 0, and cuDNN's version has a major and a minor number too."""
    cudnn = "dnn_version_info { major: 9 minor: 10 }"
    assert Target("a100", f"{cudnn} cuda_compute_capability {{ major: 8 }} {cudnn}").compute_capability == "8.0"
    assert Target("b200", f"cuda_compute_capability {{\n  major: 10\n}}\n{cudnn}").compute_capability == "10.0"
    for text in (cudnn, f"cuda_compute_capability {{ minor: 5 }} {cudnn}"):
        with pytest.raises(
            ConfigError, match=r"^--gpu x: its description has no cuda_compute_capability; the files in "
        ):
            _ = Target("x", text).compute_capability


OWN = """cuda_compute_capability { major: 8 minor: 6 } device_memory_size: 1048576 device_description_str: "é" """


def test_a_target_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert load_target("rtx3050-4gb").name == "rtx3050-4gb"
    (tmp_path / "own.txtpb").write_text(OWN, encoding="utf-8")
    target = load_target(str(tmp_path / "own.txtpb"))
    assert (target.name, target.memory, target.compute_capability, target.device_kind) == ("own", 2**20, "8.6", "é")
    with pytest.raises(ConfigError, match=rf"^--gpu {tmp_path}/gone: must be one of h100-80gb, "):
        load_target(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("1048576", "4.2", "no device_memory_size, or a wrong one"),
        ("1048576", "9" * 19, "no device_memory_size, or a wrong one"),
        ("1048576", '"a"', "no device_memory_size, or a wrong one"),
        ("device_memory_size", "memory", "does not describe a GPU"),
        ('"é"', "é", "no device_description_str, or a wrong one"),
        ("major", "minor", "no cuda_compute_capability"),
        ("8", "x" * 2**20, "does not describe a GPU"),
    ],
)
def test_a_wrong_description_is_one_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.txtpb"
    path.write_text(OWN.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^--gpu .*{said}; the files in .* show how a GPU is described$"):
        load_target(str(path))


@pytest.mark.parametrize(
    ("capability", "back_ends"), [("7.5", ["cublas"]), ("8.0", ["triton", "cublas"]), ("12.0", ["triton", "cublas"])]
)
def test_older_cards_have_one_back_end(capability: str, back_ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(device_memory, "lower_for", lambda *_: "lowered")
    monkeypatch.setattr(device_memory, "measured", lambda *given: asked.append(given[1:]) or memory(len(asked)))
    assert device_memory.bound(target(capability), None, most=9) == len(back_ends)
    options = {"triton": {}, "cublas": {"xla_gpu_enable_triton_gemm": False}}
    assert asked == [("lowered", options[name]) for name in back_ends]
    del asked[:]
    assert device_memory.bound(target(capability), None, most=0.5) == 1, "the first one is too large already"


def compiled(text: str) -> Any:
    """A lowered program."""
    sizes = {"argument_size_in_bytes": 8, "output_size_in_bytes": 6, "alias_size_in_bytes": 4, "temp_size_in_bytes": 1}
    analysis = SimpleNamespace(**{name: size * MIB for name, size in sizes.items()})

    def compile_(compiler_options: dict[str, bool]) -> Any:
        return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: analysis)

    return SimpleNamespace(compile=compile_)


def test_memory_is_read_from_the_compiled_program() -> None:
    """Outputs that take the memory of a donated argument do not count."""
    assert Memory.of(compile_for_gpu(compiled("operation_queue_id"), {})) == Memory(8, 2, 1)
    with pytest.raises(AssertionError, match="compiled for the CPU"):
        compile_for_gpu(compiled("other"), {})


@pytest.mark.parametrize("cause", ["No PTX compilation provider", "libdevice not found at"])
def test_missing_ptxas_is_named(cause: str) -> None:
    def refuse(text: str) -> Any:
        def compile_(compiler_options: Any) -> None:
            raise jax.errors.JaxRuntimeError(text)

        return SimpleNamespace(compile=compile_)

    with pytest.raises(UserError, match="planning needs ptxas"):
        compile_for_gpu(refuse(f"INTERNAL: {cause} here"), {})
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        compile_for_gpu(refuse("another"), {})


def test_without_the_plugin_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "has_cuda_plugin", lambda: False)
    with pytest.raises(UserError, match=r"planning needs JAX's CUDA plugin: .*--extra gpu-plan"):
        device_memory.lower_for(target(), jax.jit(jnp.sin), jnp.zeros(3))


def test_a_program_is_lowered_for_the_described_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one device here stands for the card. cuDNN is asked for its version only while a program is lowered."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    card, asked, versions = target(), list[Any](), list[Any]()

    def described(**given: Any) -> Any:
        asked.append(given)
        return SimpleNamespace(devices=tuple(jax.devices()))

    def program(x: jax.Array) -> jax.Array:
        versions.append(cudnn.check_cudnn_version())
        return jnp.sin(x)

    monkeypatch.setattr(device_memory, "has_cuda_plugin", lambda: True)
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    lowered = device_memory.lower_for(card, jax.jit(program), jax.ShapeDtypeStruct((3, 5), jnp.float32))
    assert "tensor<3x5xf32>" in lowered.as_text()
    assert versions == [91000]
    assert cudnn.check_cudnn_version is not None
    assert asked == [{"platform": "cuda", "topology": "1x1x1", "target_config": card.text}]
    assert device_memory.gpu_devices(card, "1x2x8") == list(jax.devices())
    assert asked[1]["topology"] == "1x2x8"
    for error in (RuntimeError, ValueError):
        monkeypatch.setattr(
            topologies, "get_topology_desc", lambda error=error, **_: (_ for _ in ()).throw(error("a\nb"))
        )
        with pytest.raises(UserError, match=r"^--gpu card: XLA cannot read this description \(a\); correct it$"):
            device_memory.gpu_devices(card)


def test_what_was_compiled_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program, the card, the devices and the options."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path))
    compiles: list[int] = []

    def compile_once(lowered: Any, options: dict[str, bool]) -> Any:
        compiles.append(1)
        size = (100 + len(compiles)) * MIB
        sizes = {"argument_size_in_bytes": size, "output_size_in_bytes": 0, "alias_size_in_bytes": 0}
        analysis = SimpleNamespace(**sizes, temp_size_in_bytes=0)
        return SimpleNamespace(memory_analysis=lambda: analysis)

    monkeypatch.setattr(device_memory, "compile_for_gpu", compile_once)
    card, lowered = load_target("rtx3050-4gb"), jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
    other = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert [measured(card, lowered, {}).total for _ in range(2)] == [101, 101]
    assert measured(card, lowered, {"x": True}).total == 102
    assert measured(load_target("rtx3060-12gb"), lowered, {}).total == 103
    assert measured(card, other, {}).total == 104
    assert measured(card, lowered, {}, "2 cards").total == 105
