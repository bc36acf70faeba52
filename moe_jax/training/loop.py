"""The training run: everything between an accepted configuration and a finished folder.

`Session.open` builds or restores, `train` takes the steps, `finish` scores the best checkpoint on the whole
validation stream. A batch is f(seed, step) and every random key is folded from seed and step, so a run resumed at a
checkpoint takes exactly the steps that it would have taken.
"""

import dataclasses
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.analysis.accounting import count_parameters, totals, training_flops
from moe_jax.analysis.saved_traces import Tracer, make_tracer
from moe_jax.config import ModelConfig, RunConfig, UserError, holds_run
from moe_jax.data.batches import train_batch, validation_subset
from moe_jax.data.references import References, references
from moe_jax.data.token_store import TokenStore, prepare
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.flags import flag_of
from moe_jax.inference.decode import SAMPLE, Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.training.checkpoint import Checkpoint, CheckpointStore, restore
from moe_jax.training.evaluate import Evaluation, EvaluationStep, evaluate, make_evaluation_step
from moe_jax.training.faults import diagnose, not_finite
from moe_jax.training.manifest import Damaged
from moe_jax.training.metrics import MetricsLog, Terminal, last_train_record
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.progress import Progress
from moe_jax.training.recorder import Recorder
from moe_jax.training.run import RunFolder, abstract_model
from moe_jax.training.signals import Signals, Stopped
from moe_jax.training.state import TrainState, initial_params, initial_state
from moe_jax.training.step import Step, make_step
from moe_jax.training.upcycle import DenseStart

INITIAL = 0
"""Purpose of a random key (see `step.DROPOUT`)."""
SAMPLE_TOKENS = 200


@dataclass
class Session:
    """One process working on one run."""

    config: RunConfig
    folder: RunFolder
    store: TokenStore
    references: References | None
    policy: Policy
    graphdef: nnx.GraphDef
    checkpoints: CheckpointStore
    state: TrainState
    progress: Progress
    train_step: Step
    evaluation_step: EvaluationStep
    decoder: Decoder
    tracer: Tracer | None
    """Routes the beginning of the validation text; None for a model without routers."""
    resumed_from: int | None
    saved_step: int
    """Step of the newest checkpoint; 0 before the first."""
    notes: list[str]
    elapsed_before: float
    origin: dict[str, Any] | None
    """Of an upcycled run: `DenseStart.origin`."""
    begin: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, config: RunConfig, saved: RunConfig | None) -> "Session":
        """Prepare data and model; of a run that is resumed, restore the newest good checkpoint.

        Raises UserError where data cannot be had or a checkpoint does not fit.
        """
        begin = time.monotonic()
        folder = RunFolder(Path(config.run_dir))
        dense = DenseStart.open(config) if saved is None else None
        tokenizer = load_tokenizer(folder.tokenizer) if saved is not None else dense and dense.tokenizer
        store = prepare(config.data, tokenizer=tokenizer, seq_len=config.model.seq_len)
        config = dataclasses.replace(config, model=_with_vocabulary(config, store))
        policy = choose_policy(config.train.precision)
        graphdef, shapes = abstract_model(config, policy.compute)
        optimizer = make_optimizer(config.train)
        checkpoints = CheckpointStore(folder.path)
        notes: list[str] = []
        newest, progress, origin = None, Progress(), None
        if saved is not None:
            abstract = jax.eval_shape(lambda p: initial_state(p, optimizer, policy.loss_scaling), shapes)
            restored = checkpoints.restore_newest(abstract, lambda c: _check_belongs(c, config, store))
            if restored is None:
                raise UserError(f"{folder.path}: every checkpoint is damaged; `python -m moe_jax doctor` says how")
            newest, state = restored
            progress = Progress.from_json(newest.manifest["context"]["progress"])
            origin = newest.manifest["context"].get("origin")
            folder.cut_back(newest.step, progress.evaluated)
            changes = folder.record_resume(saved, config, newest.step)
            notes.append(f"resumed at step {newest.step}" + (": " + ", ".join(changes) if changes else ""))
        else:
            if holds_run(folder.path):
                raise UserError(f"--out {folder.path}: another process has made a run there; add --resume to go on")
            params = initial_params(config, jax.random.fold_in(jax.random.key(config.train.seed), INITIAL))
            if dense is not None:
                params = dense.params(params, store)
                origin = dense.origin(config.upcycle)
                notes.append(f"upcycled from step {dense.checkpoint.step} of {config.upcycle}")
            state = initial_state(params, optimizer, policy.loss_scaling)
            folder.start(config, store.tokenizer, [origin] if origin else [])
        return cls(
            config=config,
            folder=folder,
            store=store,
            references=references(config.data, store),
            policy=policy,
            graphdef=graphdef,
            checkpoints=checkpoints,
            state=state,
            train_step=make_step(graphdef, optimizer, config.train, policy.loss_scaling),
            evaluation_step=make_evaluation_step(graphdef),
            decoder=Decoder(graphdef, config.model.seq_len, store.tokenizer.vocab_size),
            tracer=make_tracer(config.model, graphdef, store.valid.tokens),
            progress=progress,
            resumed_from=newest.step if newest else None,
            saved_step=newest.step if newest else 0,
            notes=notes,
            elapsed_before=newest.elapsed if newest else 0.0,
            origin=origin,
            begin=begin,
        )

    @property
    def tokens_per_step(self) -> int:
        train = self.config.train
        return train.batch_size * train.grad_accum * self.config.model.seq_len

    @property
    def elapsed(self) -> float:
        """Seconds of this run, all its sessions together."""
        return self.elapsed_before + time.monotonic() - self.begin

    def batch(self, step: int) -> np.ndarray:
        """int32 [M, B, T+1]: what the step after `step` others is trained on."""
        c = self.config.train
        rows = train_batch(
            self.store.train.tokens,
            seed=c.seed,
            step=step,
            batch_size=c.batch_size * c.grad_accum,
            seq_len=self.config.model.seq_len,
        )
        return rows.reshape(c.grad_accum, c.batch_size, -1)

    def score(self, tokens: np.ndarray, params: Any = None) -> Evaluation:
        """Evaluate the present parameters, or others, on a token stream."""
        return evaluate(
            self.evaluation_step,
            self.state.params if params is None else params,
            tokens,
            seq_len=self.config.model.seq_len,
            token_bytes=self.store.tokenizer.token_bytes(),
        )

    def subset(self) -> np.ndarray:
        """The part of the validation stream that is scored while training."""
        separator = self.store.tokenizer.separator_id
        return validation_subset(self.store.valid.tokens, separator, self.config.data.eval_tokens)

    def sample(self, step: int) -> str:
        """A story by the present parameters, from nothing."""
        tokenizer = self.store.tokenizer
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.train.seed), SAMPLE), step)
        tokens = self.decoder.stream(
            self.state.params,
            [tokenizer.separator_id],
            settings=Sampling(),
            key=key,
            stop=tokenizer.separator_id,
            limit=SAMPLE_TOKENS,
        )
        return tokenizer.decode(list(tokens))

    def save(self, step: int, val_loss: float | None) -> None:
        """Raises UserError where the state is not finite: such a checkpoint would only hide the good one before."""
        bad = not_finite(self.state)
        if bad:
            path, _ = diagnose(self, step)
            raise UserError(
                f"step {step}: {bad[0]} is not finite, so it is not saved ({path}); "
                "lower --lr, and go on from the last checkpoint with --resume"
            )
        context = {
            "data": self.store.digest,
            "tokenizer": self.store.tokenizer.digest,
            "config": dataclasses.replace(self.config, resume=False).to_dict(),
            "progress": self.progress.to_json(),
            "origin": self.origin,
        }
        self.checkpoints.save(self.state, step, val_loss=val_loss, elapsed=self.elapsed, context=context)
        self.saved_step = step


def _check_belongs(checkpoint: Checkpoint, config: RunConfig, store: TokenStore) -> None:
    """Refuse a checkpoint of other data or of another model. Raises UserError; Damaged, which lets an older one be
    tried, where it does not say."""
    context = checkpoint.manifest["context"]
    saved = context.get("config")
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or "data" not in context:
        raise Damaged("its manifest does not say what it belongs to")
    Progress.from_json(context.get("progress"))
    origin = context.get("origin")
    if origin is not None and not (isinstance(origin, dict) and isinstance(origin.get("training_flops"), int)):
        raise Damaged("its manifest does not say what it was upcycled from")
    if context["data"] != store.digest:
        raise UserError(
            f"--data {config.data.source}: not the text that the run in {config.run_dir} was trained on; "
            "resume with that text, or start a new run with another --out"
        )
    usual = dataclasses.asdict(ModelConfig())
    for name, here in dataclasses.asdict(config.model).items():
        there = model.get(name, usual[name])  # of a setting that came later, as it was before there was a choice
        if there != here:
            raise UserError(
                f"{flag_of('model', name)} {here}: {checkpoint.path} was saved with {there}; "
                "give it that value in config.json, or start a new run with another --out"
            )


def _with_vocabulary(config: RunConfig, store: TokenStore) -> Any:
    size = store.tokenizer.vocab_size
    if 0 < config.model.vocab_size < size:
        raise UserError(
            f"--model.vocab-size {config.model.vocab_size}: the tokenizer has {size} entries; give at least that, or 0"
        )
    return dataclasses.replace(config.model, vocab_size=config.model.vocab_size or size)


def train(session: Session, signals: Signals | None = None) -> None:
    """Take the steps that are left, evaluating, sampling and saving on the way.

    Raises Stopped, with everything saved, where a signal asked for it.
    """
    config, signals = session.config.train, signals or Signals()
    terminal = Terminal(config.steps, session.saved_step)
    log = MetricsLog(session.folder.metrics, session.config)
    recorder = Recorder(session, log, terminal)
    step = session.saved_step
    if step >= config.steps:
        terminal.say(f"{session.folder.path}: already trained to step {step}; --steps extends it")
    try:
        while not _pause(session, step, recorder, signals, log, terminal):
            session.state, report = session.train_step(session.state, session.batch(step))
            step += 1
            signals.unsaved = True
            recorder.add(step, report)
    finally:
        signals.unsaved = False
        terminal.close()
        log.close()


def _pause(
    session: Session, step: int, recorder: Recorder, signals: Signals, log: MetricsLog, terminal: Terminal
) -> bool:
    """What is due after `step` steps: an evaluation, a checkpoint, the end. Returns whether this was the end.

    A run that is resumed comes here first, and makes up for what a signal kept it from.
    """
    config, progress = session.config.train, session.progress
    last = step >= config.steps
    due = step > 0 and (step % config.eval_every == 0 or last) and progress.evaluated < step
    val_loss, improved = None, False
    if due:
        recorder.flush()
        with recorder.paused(), suppress(Stopped):  # a signal: save as it is, and evaluate after the resume
            val_loss = _evaluate_and_sample(session, step, log, terminal, signals)
            improved = progress.add_evaluation(step, val_loss)
    enough = bool(config.patience) and progress.without_improvement >= config.patience
    asked = signals.asked
    wanted = improved or (step > session.saved_step and (step % config.save_every == 0 or last or enough or asked))
    if wanted:
        recorder.flush()
        with recorder.paused():
            log.sync()
            session.save(step, val_loss)
            signals.unsaved = False
        asked = signals.asked  # one that came while it was saved counts, at the last step too
    if asked is not None:
        terminal.say(f"stopped at step {step}, which is saved; go on with --resume")
        raise Stopped(asked)
    if enough and not last:
        terminal.say(f"stopped early at step {step}: {config.patience} evaluations without improvement")
    return last or enough


def _evaluate_and_sample(session: Session, step: int, log: MetricsLog, terminal: Terminal, signals: Signals) -> float:
    """Raises Stopped at a signal, and then has written nothing."""
    with signals.interruptible():
        scored = session.score(session.subset())
        story = session.sample(step)
        trace = session.tracer(session.state.params) if session.tracer else None
    session.folder.add_sample(step, story)
    if trace is not None:
        session.folder.add_trace(step, trace)
    record = {"step": step, "split": "val", "loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
    log.write(
        record | {"drop_fraction": scored.drop_fraction, "tokens": scored.tokens, "wall_seconds": session.elapsed}
    )
    floor = f" (floor {session.references.entropy_floor:.3f})" if session.references else ""
    terminal.say(f"step {step} | validation loss {scored.loss:.4f} | {scored.bits_per_byte:.4f} bits/byte{floor}")
    terminal.say("  " + " ".join(story.split())[:400])
    session.folder.write_summary(summary(session, scored, step, whole_stream=False))
    return scored.loss


def finish(session: Session) -> dict[str, Any]:
    """Score the best checkpoint on the whole validation stream, and write the summary of the run."""
    best = session.checkpoints.best()
    if best is None:
        raise UserError(f"{session.folder.path}: every checkpoint was damaged after it was saved; look after the disk")
    params = session.state.params
    if best.step != int(session.state.step):
        params = restore(best, {"params": params})["params"]
    scored = session.score(session.store.valid.tokens, params)
    result = summary(session, scored, best.step, whole_stream=True)
    session.folder.write_summary(result)
    return result


def summary(session: Session, scored: Evaluation, best_step: int, whole_stream: bool) -> dict[str, Any]:
    """What summary.json holds. At the end of a run `best_step` and `val_*` are of the best checkpoint, on the whole
    validation stream; before (`val_whole_stream` is false), of the newest evaluation, on the fixed part, be it the
    best or not."""
    config, references = session.config, session.references
    last = last_train_record(session.folder.metrics)
    counts = totals(count_parameters(config.model))
    steps = int(session.state.step)
    tokens = steps * session.tokens_per_step
    device = jax.devices()[0]
    return {
        "preset": config.preset,
        "steps": steps,
        "tokens_seen": tokens,
        "train_loss": last.get("loss"),
        "val_loss": scored.loss,
        "val_bits_per_byte": scored.bits_per_byte,
        "val_bytes_per_token": scored.bytes / scored.tokens,
        "val_tokens": scored.tokens,
        "val_whole_stream": whole_stream,
        "best_step": best_step,
        "entropy_floor_bits_per_byte": references.entropy_floor if references else None,
        "trigram_bits_per_byte": references.trigram if references else None,
        "params_total": counts.total,
        "params_active": counts.active,
        "training_flops": training_flops(config, steps),
        "inherited_flops": session.origin["training_flops"] if session.origin else 0,
        "train_drop_fraction": last.get("drop_fraction"),
        "val_drop_fraction": scored.drop_fraction,
        "balance_loss": last.get("balance_loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "wall_seconds": session.elapsed,
        "device": f"{device.platform}: {device.device_kind}",
        "precision": session.policy.compute,
        "resumed_from": session.resumed_from,
    }
