"""Runs for tests, made without training: a tiny saved run (random parameters, invented metrics), and one without a
folder. And quick training."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RunConfig, TrainConfig
from moe_jax.data.token_store import TokenStore, prepare_token_store
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer
from moe_jax.model.precision import choose_policy
from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import Checkpoint, CheckpointStore, restore, stored_shapes, verify
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.load import LoadedRun, saved_config
from moe_jax.training.evaluate import make_tracer
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.session import Session
from moe_jax.training.start import Start, resumed_run
from moe_jax.training.state import initial_state
from tests.support import tiny

STEP = 40
NAME = f"step_{STEP:08d}"
"""The name of its checkpoint."""
STORY = "Once upon a time a dragon met a cat. The cat said hello to the dragon, and they ate a cake.\n"


def resuming(saved: RunConfig | None) -> Start | None:
    """What a session of a saved run starts from. None where there is no saved run."""
    return None if saved is None else resumed_run(saved)


@contextmanager
def quick_training(cache: Path, samples: bool = True) -> Iterator[pytest.MonkeyPatch]:
    """Within this block, whole runs lose little time outside training, and `cache` holds their data. Without `samples`
    the programs that write a text are not compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_JAX_CACHE", str(cache))
        patch.setattr("moe_jax.training.session.SAMPLE_TOKENS", 24)
        if not samples:
            patch.setattr(Session, "sample", lambda session, step, params: "no sample")
        yield patch


def replace_step(session: Session, step: Any) -> None:
    """Replace the training step of a session."""
    vars(session.programs)["step"] = step  # a frozen dataclass refuses an assignment


def replace_batch(session: Session, batch: Any) -> None:
    """Replace `batch(step)` of a session."""
    vars(session.data)["batch"] = batch


def unsaved_run(model: ModelConfig, tokenizer: Tokenizer | None = None, tuned: bool = False) -> LoadedRun:
    """A run of random parameters, without a folder or a checkpoint. It reads bytes unless given a tokenizer."""
    config = RunConfig(model=model, data=DataConfig(tokenizer="byte", format="chat" if tuned else "text"))
    graphdef, params = tiny.build(model)
    nowhere: Any = None
    tokenizer = tokenizer or train_tokenizer(config.data)
    return LoadedRun(config, tokenizer, nowhere, choose_policy("float32"), graphdef, graphdef, params)


def stories(folder: Path) -> str:
    """A text in a folder: its path."""
    (folder / "text.txt").write_text("<|endoftext|>".join(f"{STORY}{i}" for i in range(60)))
    return str(folder / "text.txt")


def save_checkpoint(config: RunConfig, store: TokenStore, params: Any, step: int = 0) -> RunFolder:
    """Begin a run, and save parameters as its checkpoint of a step."""
    run = RunFolder(Path(config.run_dir))
    run.start(config, store.tokenizer, [])
    state = initial_state(params, make_optimizer(config.train), loss_scaling=False)
    state = dataclasses.replace(state, step=np.int32(step))
    context = {"data": store.digest, "tokenizer": store.tokenizer.digest, "config": config.to_dict()}
    CheckpointStore(run.path).save(state, step, val_loss=1.0, elapsed=1.0, context=context)
    return run


def save_run(folder: Path, **model_changes: object) -> Path:
    """Save a run with the byte tokenizer, T = 16, two layers, four experts, and its text. Returns its folder."""
    model = tiny.config(**({"vocab_size": 257, "seq_len": 16, "capacity_factor": 1.0} | model_changes))
    train = TrainConfig(steps=STEP)
    execution = ExecutionConfig(compute_dtype="float32")
    data = DataConfig(source=stories(folder), tokenizer="byte")
    config = RunConfig(out=str(folder / "run"), model=model, data=data, train=train, execution=execution)
    store = prepare_token_store(data, progress=False, cache=folder / "cache")
    graphdef, params = tiny.build(model)
    run = save_checkpoint(config, store, params, STEP)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics(model.layers, model.experts)))
    tracer = make_tracer(model, graphdef, store.valid.tokens)
    if tracer is not None:
        for step, seed in ((STEP // 2, 1), (STEP, 0)):
            run.add_trace(step, tracer(tiny.build(model, seed)[1]))
    run.write_summary({"val_bits_per_byte": 1.5, "entropy_floor_bits_per_byte": 0.5})
    return run.path


def metrics(layers: int, experts: int) -> list[dict]:
    """Records of a run: the load is even in layer 0; in the other layers all tokens go to expert 0 from step 30 on."""
    even = [1 / experts] * experts
    collapsed = [1.0] + [0.0] * (experts - 1)
    records = []
    for step in range(10, STEP + 1, 10):
        load = [even] + [collapsed if step >= 30 else even] * (layers - 1)
        values = {"loss": 5 - step / 10, "balance_loss": 1.0, "drop_fraction": 0.1, "lr": 1e-3, "load": load}
        records.append({"step": step, "split": "train", "tokens_per_second": 100.0, **values})
    records.append({"step": STEP, "split": "val", "loss": 1.2, "bits_per_byte": 1.5})
    return records


def largest_file(folder: Path) -> Path:
    """The largest file of a checkpoint, apart from its manifest."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME)
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(run: Path, name: str = NAME, /, **context: object) -> None:
    """Change the context in the manifest of a checkpoint, with a right digest."""
    path = run / "checkpoints" / name / manifest.NAME
    document = json.loads(path.read_text())
    document["context"] |= context
    manifest.write(path.parent, document)


def edit_config(run: Path, section: str, **changes: object) -> None:
    """Change the configuration in config.json and in the manifest of the checkpoint, with a right digest."""
    document = saved_config(CheckpointStore(run).at(STEP)).to_dict()
    document[section] |= changes
    (run / "config.json").write_text(json.dumps(document))
    edit_manifest(run, config=document)


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run, whose files are undamaged."""
    checkpoint = CheckpointStore(run).list()[-1]
    assert verify(checkpoint) is None
    return checkpoint


def array_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Name -> digest of the bytes of each array of a checkpoint, without its sharding."""
    arrays = restore(checkpoint, stored_shapes(checkpoint))
    return {name: xxhash.xxh3_128_hexdigest(np.asarray(array).tobytes()) for name, array in arrays.items()}


def as_version_3(checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the layout of a manifest of version 3: `arrays/` holds the parameters too."""
    import orbax.checkpoint as ocp

    arrays, digests = restore(checkpoint, stored_shapes(checkpoint)), array_digests(checkpoint)
    shutil.rmtree(checkpoint.path / "arrays")
    with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
        checkpointer.save((checkpoint.path / "arrays").resolve(), arrays)
    leaves = {name: [list(x.shape), str(x.dtype), digests[name]] for name, x in sorted(arrays.items())}
    paths = [path for path in checkpoint.path.rglob("*") if path.is_file() and path.name != manifest.NAME]
    document = {key: checkpoint.manifest[key] for key in ("step", "val_loss", "elapsed")}
    document |= {"files": manifest.describe_files(checkpoint.path, paths), "leaves": leaves, "state": "s"}
    document |= {key: checkpoint.manifest[key] for key in ("context", "versions")}
    manifest.write(checkpoint.path, {"version": 3} | document)
