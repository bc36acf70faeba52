"""A session is one process that works on one run: its data, its programs, its counters, and the state of training.

`Session.open` starts a run, or restores the newest good checkpoint of a run.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RunConfig, UserError
from moe_jax.config.section import flag_of
from moe_jax.data.baselines import corpus_baselines
from moe_jax.data.token_store import TokenStore, prepare_token_store
from moe_jax.data.tokenizers import Stream
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params
from moe_jax.parallel.layout import mesh_of
from moe_jax.parallel.processes import agree_on, place
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.catalog import holds_run
from moe_jax.runs.checkpoint import Checkpoint, CheckpointCorrupted, CheckpointStore, doctor_of
from moe_jax.runs.folder import RunFolder, read_entry
from moe_jax.runs.load import check_full_weights, load_run_tokenizer, saved_config
from moe_jax.system import environment
from moe_jax.system.machine import versions
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.data import SessionData
from moe_jax.training.evaluate import Evaluation, Tracer, evaluate
from moe_jax.training.fit import fit, with_failure
from moe_jax.training.programs import Programs
from moe_jax.training.start import Start
from moe_jax.training.state import RunCounters, TrainState

if TYPE_CHECKING:
    from moe_jax.training.initial_weights import InitialWeights

HELD_BYTES = 64
"""Bytes for each parameter that a process holds on a CPU when it keeps freed memory, as measured for `seed-158m`. Where
this is more than half of the memory, a run gives large blocks back: a step is then slower by a quarter."""
SAMPLE_TOKENS = 200
"""Longest sample of text at an evaluation."""


@dataclass
class Session:
    """One process working on one run."""

    config: RunConfig
    folder: RunFolder
    checkpoints: CheckpointStore
    data: SessionData
    programs: Programs
    state: TrainState
    decoder: Decoder
    tracer: Tracer | None
    """Routes the beginning of the validation text; None for a model without routers."""
    notes: list[str] = field(default_factory=list)
    """Lines to print about how the session was opened."""
    counters: RunCounters = field(default_factory=RunCounters)
    begin: float = 0.0
    """`time.monotonic()` at the start of this process's work."""
    elapsed_before: float = 0.0
    """Seconds of the run before this process."""
    resumed_from: int | None = None
    saved_step: int = 0
    """Step of the newest checkpoint; 0 before the first."""
    origin: dict[str, Any] | None = None
    """`Initial.origin` of a run that was upcycled, imported or fine-tuned. Else None."""
    fitted: Any = None
    """`Fitted.record`."""
    half_time: float = 0.0
    """With `--minutes`: seconds of the run after half of the steps that measure its pace."""

    @property
    def elapsed(self) -> float:
        """Seconds of the run, summed over all its processes."""
        return self.elapsed_before + time.monotonic() - self.begin

    @classmethod
    def open(cls, config: RunConfig, start: Start | None = None, failed: RunConfig | None = None) -> "Session":
        """Prepare data and model. A run that is resumed is restored from its newest good checkpoint; a new one starts
        from the weights of `start`, or from noise without it. The settings are made to fit the device (`fit.py`), after
        those that `failed` for lack of memory.

        Raises UserError if the data cannot be read, if a checkpoint does not fit, or if nothing fits the device.
        """
        begin, mesh = time.monotonic(), mesh_of(config.execution.mesh)
        folder = RunFolder(Path(config.run_dir))
        checkpoints = CheckpointStore(folder.path)
        saved = start.saved if start else None
        weights = start.weights() if start else None
        tokenizer, precision = weights.tokenizer if weights else None, ""
        if saved is not None:
            newest = next(reversed(checkpoints.list()), None)
            precision = newest.context.get("compute_dtype", "") if newest else ""
            tokenizer = load_run_tokenizer(folder.path, newest, saved.model)
        needed = None if config.data.format == "chat" else config.model.seq_len  # short conversations are padded
        store = prepare_token_store(config.data, tokenizer=tokenizer, seq_len=needed)
        vocab_size = config.model.vocab_size or store.tokenizer.vocab_size
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
        fitted = fit(config, precision, saved, read_entry(folder.path, "fitted") if saved else None, failed)
        config = fitted.config
        programs = Programs.of(config, mesh=mesh, kept_precision=precision)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(programs.param_shapes))
        if HELD_BYTES * parameters > (environment.machine_memory() or math.inf) / 2:
            environment.return_large_blocks()
        agree_on(_facts(config, saved is not None, store, programs.policy.compute))
        data = SessionData(config, store, corpus_baselines(config.data, store))
        data.subset()  # raises UserError now, and not at the first evaluation
        opened = cls(
            config=config,
            folder=folder,
            checkpoints=checkpoints,
            data=data,
            programs=programs,
            begin=begin,
            state=programs.state_shapes,
            decoder=programs.decoder(store.tokenizer.vocab_size),
            tracer=programs.tracer(store.valid.tokens),
            notes=[fitted.note] if fitted.note else [],
            fitted=fitted.record,
        )
        opened._start(weights) if saved is None else opened._restore()
        return opened

    def _start(self, weights: "InitialWeights | None") -> None:
        """Begin a new run: initial parameters, and the first files of the folder."""
        if holds_run(self.folder.path):
            raise UserError(f"--out {self.folder.path}: another process has made a run there; add --resume to go on")
        if weights is None:
            params = self.programs.initial_params()
        else:
            params, self.origin, note = weights.read(self.programs, self.data.store)
            self.notes.append(note)
        self.state = self.programs.state(params)
        history = [self.origin] if self.origin else []
        self.folder.start(self.config, self.data.store.tokenizer, history, self.fitted)

    def _restore(self) -> None:
        """Restore the newest good checkpoint, and remove what was logged after it."""
        restored = self.checkpoints.restore_newest(
            self.programs.state_shapes, lambda c: check_same_data_and_model(c, self.config, self.data.store)
        )
        if restored is None:
            run = self.folder.path
            raise UserError(f"{run}: every checkpoint is damaged; {doctor_of(run)} says how")
        newest, self.state = restored
        context = newest.context
        self.counters, self.origin = RunCounters.from_json(context["progress"]), context.get("origin")
        self.resumed_from, self.saved_step, self.elapsed_before = newest.step, newest.step, newest.elapsed
        self.folder.truncate_logs_after(newest.step, self.counters.evaluated)
        changes = self.folder.record_resume(saved_config(newest), self.config, newest.step, self.fitted)
        self.notes.append(f"resumed at step {newest.step}" + (": " + ", ".join(changes) if changes else ""))

    def set_steps(self, steps: int) -> None:
        """Set the number of steps of the run, and record it. The next step compiles again: its learning rate follows
        another schedule."""
        self.config = self.config.override({("train", "steps"): steps})
        mesh = None if self.programs.layout is None else self.programs.layout.mesh
        self.programs = Programs.of(self.config, mesh=mesh, kept_precision=self.programs.policy.compute)
        history = read_entry(self.folder.path, "history") or []
        self.folder.write_config(self.config, history, self.fitted)

    def record_out_of_memory(self) -> None:
        """Write into config.json that the device lacked memory for the present settings."""
        history = read_entry(self.folder.path, "history") or []
        self.folder.write_config(self.config, history, with_failure(self.config, self.fitted))

    def batch(self, step: int) -> Any:
        """The batch of the step that follows `step` earlier steps, as `programs.step` takes it."""
        layout = self.programs.layout
        if layout is None or not layout.mesh.is_multi_process:
            return self.data.batch(step)
        return jax.tree.map(lambda x: place(x, layout.sharding(layout.batch)), self.data.batch(step))

    @property
    def params(self) -> Params:
        """The present parameters of the plain model. With adapters they are a copy of all weights."""
        return self.programs.weights(self.state)

    def score(self, stream: Stream, params: Any = None) -> Evaluation:
        """Evaluate `params` on a stream, or the present parameters if `params` is None."""
        return evaluate(
            self.programs.evaluation,
            self.params if params is None else params,
            stream.tokens,
            seq_len=self.config.model.seq_len,
            token_bytes=self.data.store.tokenizer.token_bytes(),
            answers=stream.answers,
        )

    def sample(self, step: int, params: Params) -> str:
        """A text that begins with the first words of the validation text, and that the present parameters go on. Of
        conversations, the first question and an answer, each on a line."""
        tokenizer = self.data.store.tokenizer
        prompt = self.data.sample_prompt()
        tokens = self.decoder.stream(
            params,
            prompt,
            settings=Sampling(),
            key=purpose_key(self.config.train.seed, Purpose.SAMPLE, step),
            stop=tokenizer.separator_id,
            limit=SAMPLE_TOKENS,
        )
        turns = groupby([*prompt[1:], *tokens], lambda token: token == tokenizer.separator_id)
        return "\n".join(tokenizer.decode(list(turn)) for ends, turn in turns if not ends)

    def save(self, step: int, val_loss: float | None) -> None:
        """Write a checkpoint.

        Raises UserError if the state is not finite. Such a checkpoint would be the newest, and hide the last good one.
        """
        if bad := nonfinite_leaves(self.state):
            raise UserError(
                f"step {step}: {bad[0]} is not finite, so it is not saved; lower --lr, and go on with --resume"
            )
        context = {
            "data": self.data.store.digest,
            "tokenizer": self.data.store.tokenizer.digest,
            "config": dataclasses.replace(self.config, resume=False).to_dict(),
            "progress": self.counters.to_json(),
            "origin": self.origin,
            "compute_dtype": self.programs.policy.compute,
        }
        self.checkpoints.save(self.state, step, val_loss=val_loss, elapsed=self.elapsed, context=context)
        self.saved_step = step


def _facts(config: RunConfig, resumed: bool, store: TokenStore, precision: str) -> dict[str, Any]:
    """What all processes of a run must have in common. The run's folder may be mounted under another path."""
    settings = ((config.section(section), name, value) for section, name, value in config.settings())
    facts = {flag_of(section, name): value for section, name, value in settings if name != "out"}
    facts |= {"a run in --out": resumed, "the text": store.digest, "the tokenizer": store.tokenizer.digest}
    return facts | {"--precision": precision} | {f"version of {name}": v for name, v in versions().items()}


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def nonfinite_leaves(tree: Any) -> list[str]:
    """Names of the leaves that hold a NaN or an infinity, in the order of the tree."""
    leaves = {n: x for n, x in named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = np.asarray(_all_finite(list(leaves.values())))
    return [name for name, is_finite in zip(leaves, finite, strict=True) if not is_finite]


def check_same_data_and_model(checkpoint: Checkpoint, config: RunConfig, store: TokenStore) -> None:
    """Check that a checkpoint belongs to this data and this model.

    Raises UserError if it does not. Raises CheckpointCorrupted if its manifest does not say; the caller then tries an
    older checkpoint.
    """
    check_full_weights("--out", Path(config.run_dir), checkpoint)
    context = checkpoint.context
    if "data" not in context:
        raise CheckpointCorrupted("its manifest does not say what it belongs to")
    RunCounters.from_json(context.get("progress"))
    if context["data"] != store.digest:
        raise UserError(
            f"--data {config.data.source}: not the text that the run in {config.run_dir} was trained on; "
            "resume with that text, or start a new run with another --out"
        )
    for (section, name), value in saved_config(checkpoint).kept_settings("resume").items():
        there = config.section(section)
        if section in ("model", "routing") and getattr(there, name) != value:
            problem = f"{checkpoint.path} was saved with {value}; start a new run with another --out"
            raise UserError(str(there.wrong(name, problem)))
