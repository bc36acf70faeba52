"""`import`: a folder with the layout of a public mixture becomes a run, of the rounded weights and nothing else."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moe_jax
from moe_jax.cli.main import main, run_as, run_command
from moe_jax.config import UserError
from moe_jax.interop.architectures import MULTIPLIERS
from moe_jax.interop.export import export
from moe_jax.interop.imported_run import Form, import_run
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.source import open_source
from moe_jax.model.quantized import in_tiles, quantize
from moe_jax.model.transformer import abstract_model
from moe_jax.runs.arrays import named_leaves
from moe_jax.training.initial_weights import of_run
from tests.interop import public_shapes
from tests.interop.made import byte_tokenizer
from tests.reliability import runs

SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "eos_token_id": 256,
}
SMALLER = {
    "olmoe": {"num_key_value_heads": 4, "num_experts": 6},
    "granite": {"num_key_value_heads": 2, "num_local_experts": 6},
}


def published(folder: Path, name: str = "olmoe", shard_bytes: int = 100_000, **changes: Any) -> Path:
    """A folder as `benchmarks/public_shapes.py` writes it, of a small model in several shards, with a tokenizer of
    bytes, and with norms and routers that are no ones."""
    config = public_shapes.CONFIGS[name] | SMALL | SMALLER[name] | changes
    folder.mkdir()
    byte_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    rng, places = np.random.default_rng(0), {}
    for number, shard in enumerate(public_shapes.shards(config, shard_bytes)):
        file = f"model-{number}.safetensors"
        tensors = {n: (rng.normal(size=s) * 0.2 + (len(s) == 1)).astype(ml_dtypes.bfloat16) for n, s in shard.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def opened(folder: Path) -> Pretrained:
    return Pretrained.open(folder, "SOURCE")


@pytest.mark.parametrize("form", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("name", ["olmoe", "granite"])
def test_the_weights_are_those_of_the_folder_rounded(name: str, form: Form, tmp_path: Path) -> None:
    """The oracle reads the whole model in float32, and rounds it afterwards."""
    model = opened(published(tmp_path / "hf", name))
    assert len({tensor.file.name for tensor in model.weights.tensors.values()}) > 1
    made = import_run(model, form, 40, tmp_path / "run")
    whole = model.params(abstract_model(model.shape.model)[1])[0]
    if form == "bfloat16":
        expected = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if p.ndim > 1 else p, whole)
    else:
        expected = in_tiles(quantize(whole, form))
    run = moe_jax.load_run(tmp_path / "run")
    found, wanted = named_leaves(run.params), named_leaves(expected)
    assert found.keys() == wanted.keys()
    for leaf, array in wanted.items():
        assert found[leaf].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[leaf]), np.asarray(array), err_msg=leaf)
    assert made.bytes_written == sum(array.nbytes for array in wanted.values())
    assert made.parameters.total == sum(p.size for p in jax.tree.leaves(whole))
    assert run.config.model.seq_len == 40
    assert np.isfinite(run.logits("Once upon a time")).all()


def test_a_longer_context_than_the_model_reads_is_not_taken(tmp_path: Path) -> None:
    """Positions beyond those of its training, or of its window of attention, would give other logits."""
    model = opened(published(tmp_path / "hf", max_position_embeddings=50))
    for context, read in ((96, 50), (50, 50), (20, 20)):
        import_run(model, "int8", context, tmp_path / f"run-{context}")
        assert moe_jax.load_run(tmp_path / f"run-{context}").config.model.seq_len == read


@pytest.mark.parametrize("name", SMALLER)
def test_unquantised_weights_go_back(name: str, tmp_path: Path) -> None:
    """With Granite's multipliers too, which are no part of the weights."""
    folder = published(tmp_path / "hf", name)
    import_run(opened(folder), "bfloat16", 40, tmp_path / "run")
    export(open_source(tmp_path / "run"), "hf", "bfloat16", tmp_path / "back", "")
    back = load_file(tmp_path / "back" / "model.safetensors")
    there = {n: array for file in folder.glob("*.safetensors") for n, array in load_file(file).items()}
    assert back.keys() == there.keys()
    for tensor, array in there.items():
        np.testing.assert_array_equal(back[tensor], array, err_msg=tensor)
    found, given = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", folder))
    assert [found.get(field) for field in MULTIPLIERS] == [given.get(field) for field in MULTIPLIERS]


LAYER = "model.layers.0"
PLACES = {
    "norm": f"{LAYER}.input_layernorm.weight",
    "attention": f"{LAYER}.self_attn.v_proj.weight",
    "router": f"{LAYER}.mlp.gate.weight",
    "expert": f"{LAYER}.mlp.experts.4.up_proj.weight",
    "head": "lm_head.weight",
    "embedding": "model.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def by_width(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder with one layer of a width, made once."""
    made: dict[int, Path] = {}

    def of(width: int) -> Path:
        if width not in made:
            folder = tmp_path_factory.mktemp("width") / "hf"
            made[width] = published(folder, hidden_size=width, num_hidden_layers=1, shard_bytes=10**9)
        return made[width]

    return of


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("width", "place"), [*((128, place) for place in PLACES), (2048, "expert"), (2048, "head")])
def test_a_single_value_that_is_not_finite_is_named(
    width: int, place: str, value: float, by_width: Callable[[int], Path], tmp_path: Path
) -> None:
    """A processor's maximum may leave a NaN out, so each kind of place, in each form, has one value of many."""
    folder = tmp_path / "hf"
    shutil.copytree(by_width(width), folder)
    (file,) = folder.glob("*.safetensors")
    tensors = {n: array.copy() for n, array in load_file(file).items()}
    tensors[PLACES[place]].reshape(-1)[-77] = value
    save_file(tensors, file)
    forms: tuple[Form, ...] = ("int4", "int8", "bfloat16") if width == 128 else ("int4", "int8")
    for form in forms:
        with pytest.raises(UserError, match=f"{PLACES[place]} has NaN or infinite values") as failure:
            import_run(opened(folder), form, 40, tmp_path / "run")
        assert "\n" not in str(failure.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_it_is_read_and_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = published(tmp_path / "hf")
    (text := tmp_path / "text.txt").write_text("Once upon a time. " * 50)
    for form in ("int8", "bfloat16"):
        run = tmp_path / form
        import_run(opened(folder), form, 40, run)
        assert main(lambda argv: run_as("train", argv, "train.py"), ["--out", str(run), "--resume"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert run_command(["evaluate", "--run", str(run), "--data", str(text)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"] > 0
    with pytest.raises(UserError, match="its weights are int8; name the run that they were made of"):
        of_run("--run", str(tmp_path / "int8"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = published(tmp_path / "Tiny-MoE")
    monkeypatch.chdir(tmp_path)
    assert main(run_command, ["import", str(folder), "--context", "32"]) == 0
    assert "runs/tiny-moe: olmoe" in capsys.readouterr().out
    assert main(run_command, ["generate", "--prompt", "Once", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("Once")
    assert main(run_command, ["import", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(run_command, ["import", str(tmp_path / "gone")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


MEASURED = """
import sys
from pathlib import Path
from moe_jax.interop.imported_run import import_run
from moe_jax.interop.pretrained import Pretrained

def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

folder = Path(sys.argv[1])
import_run(Pretrained.open(folder / "small", "SOURCE"), "int4", 40, folder / "small-run")  # compiles
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
made = import_run(Pretrained.open(folder / "large", "SOURCE"), "int4", 40, folder / "large-run")
print(status("VmHWM") - before, made.bytes_read)
"""


@pytest.mark.interop
def test_the_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says the peak memory of a part of a process")
    shape = {"hidden_size": 512, "intermediate_size": 256, "num_experts": 8}
    published(tmp_path / "small", shard_bytes=10**7, num_hidden_layers=1, **shape)
    published(tmp_path / "large", shard_bytes=10**7, num_hidden_layers=24, **shape)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, env=runs.environment(tmp_path), capture_output=True, text=True, check=True)
    grown, read = map(int, done.stdout.split())
    assert read > 180e6
    assert grown < 20e6


@pytest.mark.reliability
def test_a_killed_import_leaves_no_run_and_the_next_one_clears_up(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 256, "num_experts": 8, "num_hidden_layers": 48}
    folder, out = published(tmp_path / "hf", shard_bytes=10**7, **shape), tmp_path / "runs" / "killed"
    arguments = ["import", str(folder), "--out", str(out)]
    seen = 0
    for _ in range(4):
        process = runs.start(arguments, tmp_path, runs.COMMANDS)
        deadline = time.monotonic() + 120
        while not list(out.parent.glob(".killed.partial/checkpoints/.step_*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02 * seen)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen += process.returncode == -signal.SIGKILL
        assert not out.exists()
        assert len(list(out.parent.iterdir())) == 1  # what an earlier kill left is gone
    assert seen == 4
    done = runs.complete(arguments, tmp_path, runs.COMMANDS)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.parent.iterdir()] == ["killed"]
    assert moe_jax.load_run(out).checkpoint.step == 0
