"""What is wrong with a folder is said in one line, before anything of the model's size is built, and nothing is
written. The files are made by hand, without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.config import UserError
from moe_jax.interop.pretrained import Pretrained
from moe_jax.model.transformer import abstract_model
from tests.interop.made import llama, read, refused, text_file
from tests.reliability import runs

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "hf")


def test_a_whole_folder_is_read(folder: Path) -> None:
    params, digest = read(folder)
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["blocks"][1]["attention"]["qkv"][:, :32], tensors[Q].T)
    assert len(digest) == 32
    changed = dict(tensors)
    changed[Q] = tensors[Q] + 1
    save_file(changed, folder / "model.safetensors")
    assert read(folder)[1] != digest
    save_file(tensors, folder / "model.safetensors")
    assert read(folder)[1] == digest
    (folder / "tokenizer_config.json").write_text("{}")
    assert read(folder)[1] != digest


# Tensors


NAN, INF = np.full((32, 32), np.nan, np.float32), np.zeros((32, 32), np.float32)
INF[31, 31] = -np.inf
TENSORS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop(Q), f"has no tensor {Q}, which its config.json asks for; download"),
    "surplus": (lambda t: t.update({"model.extra.weight": NAN}), "has the tensor model.extra.weight"),
    "wrong shape": (
        lambda t: t.update({Q: np.zeros((16, 32), np.float32)}),
        f"{Q} has shape [16, 32], and config.json gives [32, 32]; take both from the same folder",
    ),
    "wrong dtype": (
        lambda t: t.update({Q: np.zeros((32, 32), np.int32)}),
        f"{Q} has dtype I32, must be one of F32, F16, BF16; open the folder in transformers",
    ),
    "not a number": (lambda t: t.update({Q: NAN}), f"{Q} has NaN or infinite values"),
    "infinite": (lambda t: t.update({Q: INF}), f"{Q} has NaN or infinite values"),
    "odd name": (lambda t: t.update({"a\n\x1b[2J" + "x" * 500: NAN}), "has the tensor a\\x0a"),
    "another head": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "lm_head.weight is not the embedding, and config.json says tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_named(name: str, folder: Path) -> None:
    change, said = TENSORS[name]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, said if name != "odd name" else "has the tensor a")


def test_what_changes_nothing_is_accepted(folder: Path) -> None:
    """A head equal to the embedding that it is tied to, and the frequencies of old files."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert "head" not in read(folder)[0]


def test_values_too_large_for_the_training_dtype_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[Q][0, 0] = np.finfo(np.float32).max
    save_file(tensors, folder / "model.safetensors")
    opened = Pretrained.open(folder, "--init-from")
    with pytest.raises(UserError, match=f"{Q} has NaN or infinite values in bfloat16"):
        opened.params(abstract_model(opened.shape.model, param_dtype="bfloat16")[1])


# Headers


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)


def test_a_hostile_header(folder: Path) -> None:
    """Two tensors in the same bytes. The library checks headers."""
    header, data = header_of(folder)
    header[Q]["data_offsets"] = [n - 4 for n in header[Q]["data_offsets"]]
    write(folder, json.dumps(header).encode(), data)
    refused(folder, "its weights cannot be read (Error while deserializing header: ")


# Folders and shards


def shard(folder: Path) -> dict[str, str]:
    """Cut the weights into two files with an index. Returns its `weight_map`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    places = {name: file for file, inside in parts.items() for name in inside}
    index(folder, places)
    return places


def index(folder: Path, places: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_read_as_one_file(folder: Path) -> None:
    whole = read(folder)
    places = shard(folder)
    params, digest = read(folder)
    np.testing.assert_array_equal(params["embedding"], whole[0]["embedding"])
    assert digest == whole[1]
    last = folder / max(places.values())
    save_file(load_file(last) | {min(places): np.zeros((32, 32), np.float32)}, last)
    refused(folder, f"its weights cannot be read (the tensor {min(places)} stands in two files)")
    last.unlink()
    refused(folder, "its weights cannot be read ([Errno 2] No such file")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", "sub/x.safetensors", "\0", "model.bin"])
def test_an_index_names_only_files_of_its_folder(file: str, folder: Path) -> None:
    (folder.parent / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    places = shard(folder)
    index(folder, places | {Q: file})
    refused(folder, "which is no name of a .safetensors file")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": null}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(content: str, folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "its weights cannot be read (")


def test_nothing_is_unpickled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch touched'\ntR.")
    refused(folder, "files of other kinds can run code")
    assert not (tmp_path / "touched").exists()


def test_links_are_followed_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    read(folder)


# The whole program


@pytest.mark.reliability
def test_a_fault_is_one_line_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    """With a NaN in the last tensor: everything is accepted before it is seen."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    words = ["--init-from", "hf", "--data", str(text_file(tmp_path)), "--out", "deep/run", "--seq-len", "64"]
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "train.py"), *words],
        cwd=tmp_path,
        env=runs.environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: hf: tensor model.norm.weight has NaN or infinite values")
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "hf", "text.txt"]
