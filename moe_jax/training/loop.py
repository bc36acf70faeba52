"""The training run: everything between an accepted configuration and a finished folder.

`Session.open` builds or restores, `train` takes the steps, `finish` scores the best checkpoint on the whole
validation stream. A batch is f(seed, step) and every random key is folded from seed and step, so a run resumed at a
checkpoint takes exactly the steps that it would have taken.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.analysis.accounting import count_parameters, matmul_rate, totals, training_flops
from moe_jax.config import RunConfig, UserError
from moe_jax.data.batches import train_batch, validation_subset
from moe_jax.data.references import References, references
from moe_jax.data.token_store import TokenStore, prepare
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.inference.decode import SAMPLE, Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.training.checkpoint import CheckpointStore, restore
from moe_jax.training.evaluate import Evaluation, EvaluationStep, evaluate, make_evaluation_step
from moe_jax.training.metrics import MetricsLog, Terminal
from moe_jax.training.optimizer import learning_rate, make_optimizer
from moe_jax.training.run import RunFolder, abstract_model
from moe_jax.training.state import TrainState, initial_params, initial_state
from moe_jax.training.step import Step, StepReport, make_step

INITIAL = 0
"""Purpose of a random key (see `step.DROPOUT`)."""
SAMPLE_TOKENS = 200
MAX_SKIPPED_IN_A_ROW = 20


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
    train_step: Step
    evaluation_step: EvaluationStep
    decoder: Decoder
    resumed_from: int | None
    notes: list[str]
    elapsed_before: float
    begin: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, config: RunConfig, saved: RunConfig | None) -> "Session":
        """Prepare data and model; of a run that is resumed, restore the newest good checkpoint.

        Raises UserError where data cannot be had or a checkpoint does not fit.
        """
        begin = time.monotonic()
        folder = RunFolder(Path(config.run_dir))
        tokenizer = load_tokenizer(folder.tokenizer) if saved is not None else None
        store = prepare(config.data, tokenizer=tokenizer, seq_len=config.model.seq_len)
        config = dataclasses.replace(config, model=_with_vocabulary(config, store))
        policy = choose_policy(config.train.precision)
        graphdef, shapes = abstract_model(config, policy.compute)
        optimizer = make_optimizer(config.train)
        checkpoints = CheckpointStore(folder.path)
        notes: list[str] = []
        abstract = jax.eval_shape(lambda p: initial_state(p, optimizer, policy.loss_scaling), shapes)
        newest = checkpoints.newest() if saved is not None else None
        if saved is not None and newest is None:
            raise UserError(f"{folder.path}: every checkpoint is damaged; start again in another folder")
        if saved is not None and newest is not None:
            if newest.manifest["context"]["data"] != store.digest:
                raise UserError(
                    f"--data {config.data.source}: not the text that the run in {folder.path} was trained on; "
                    "resume with that text, or start a new run with another --out"
                )
            state = restore(newest, abstract)
            folder.cut_back(newest.step)
            changes = folder.record_resume(saved, config, newest.step)
            notes.append(f"resumed at step {newest.step}" + (": " + ", ".join(changes) if changes else ""))
        else:
            key = jax.random.fold_in(jax.random.key(config.train.seed), INITIAL)
            state = initial_state(initial_params(config, key), optimizer, policy.loss_scaling)
            folder.start(config, store.tokenizer)
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
            decoder=Decoder(graphdef, config.model.seq_len),
            resumed_from=newest.step if newest else None,
            notes=notes,
            elapsed_before=newest.elapsed if newest else 0.0,
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
        context = {"data": self.store.digest, "tokenizer": self.store.tokenizer.digest}
        self.checkpoints.save(self.state, step, val_loss=val_loss, elapsed=self.elapsed, context=context)


def _with_vocabulary(config: RunConfig, store: TokenStore) -> Any:
    size = store.tokenizer.vocab_size
    if 0 < config.model.vocab_size < size:
        raise UserError(
            f"--model.vocab-size {config.model.vocab_size}: the tokenizer has {size} entries; give at least that, or 0"
        )
    return dataclasses.replace(config.model, vocab_size=config.model.vocab_size or size)


def train(session: Session) -> None:
    """Take the steps that are left, evaluating, sampling and saving on the way."""
    config = session.config.train
    first = int(session.state.step)
    terminal = Terminal(config.steps, first)
    log = MetricsLog(session.folder.metrics, session.config)
    recorder = _Recorder(session, log, terminal)
    best, without_improvement = _best_so_far(session), 0
    try:
        for step in range(first, config.steps):
            session.state, report = session.train_step(session.state, session.batch(step))
            recorder.add(step + 1, report)
            done = step + 1
            last = done == config.steps
            val_loss, improved = None, False
            if done % config.eval_every == 0 or last:
                recorder.flush()
                with recorder.paused():
                    val_loss = _evaluate_and_sample(session, done, log, terminal)
                improved = val_loss < best
                best, without_improvement = min(best, val_loss), 0 if improved else without_improvement + 1
            stop = bool(config.patience) and without_improvement >= config.patience
            if done % config.save_every == 0 or last or improved or stop:
                recorder.flush()
                with recorder.paused():
                    session.save(done, val_loss)
            if stop:
                terminal.say(f"stopped early at step {done}: {config.patience} evaluations without improvement")
                break
    finally:
        terminal.close()
        log.close()


def _best_so_far(session: Session) -> float:
    best = session.checkpoints.best() if session.resumed_from is not None else None
    return math.inf if best is None or best.val_loss is None else best.val_loss


def _evaluate_and_sample(session: Session, step: int, log: MetricsLog, terminal: Terminal) -> float:
    scored = session.score(session.subset())
    story = session.sample(step)
    session.folder.add_sample(step, story)
    record = {"step": step, "split": "val", "loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
    log.write(
        record | {"drop_fraction": scored.drop_fraction, "tokens": scored.tokens, "wall_seconds": session.elapsed}
    )
    floor = f" (floor {session.references.entropy_floor:.3f})" if session.references else ""
    terminal.say(f"step {step} | validation loss {scored.loss:.4f} | {scored.bits_per_byte:.4f} bits/byte{floor}")
    terminal.say("  " + " ".join(story.split())[:400])
    session.folder.write_summary(summary(session, scored, step, whole_stream=False))
    return scored.loss


class _Recorder:
    """Turns step reports into records, one step late: reading a report waits for its step, and by then the device
    already works on the next."""

    def __init__(self, session: Session, log: MetricsLog, terminal: Terminal) -> None:
        self._session, self._log, self._terminal = session, log, terminal
        self._pending: tuple[int, StepReport] | None = None
        self._schedule = learning_rate(session.config.train, session.config.train.lr)
        self._mark, self._mark_step = time.monotonic(), int(session.state.step)
        self._skipped_in_a_row = 0
        self._peak = matmul_rate(session.policy.compute)
        self._is_first = True

    def add(self, step: int, report: StepReport) -> None:
        self.flush()
        self._pending = (step, report)

    def flush(self) -> None:
        """Read the pending report, if there is one."""
        if self._pending is None:
            return
        step, report = self._pending
        self._pending = None
        finite = bool(report.finite)
        if self._is_first:
            self._is_first = False
            seconds = time.monotonic() - self._session.begin
            self._terminal.say(f"first step done {seconds:.1f} s after the start, data and compilation included")
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite; "
                "lower --lr, and go on from the last checkpoint with --resume"
            )
        config = self._session.config.train
        if step % config.log_every == 0 or step == config.steps or not finite:
            self._write(step, report)

    def _write(self, step: int, report: StepReport) -> None:
        session, metrics = self._session, report.metrics
        now = time.monotonic()
        rate = (step - self._mark_step) * session.tokens_per_step / max(now - self._mark, 1e-9)
        self._mark, self._mark_step = now, step
        record = {
            "step": step,
            "split": "train",
            "loss": float(metrics.loss),
            "balance_loss": float(metrics.balance_loss),
            "z_loss": float(metrics.z_loss),
            "drop_fraction": float(metrics.drop_fraction),
            "grad_norm": float(report.grad_norm),
            "skipped": not bool(report.finite),
            "lr": float(np.asarray(self._schedule(step - 1))),
            "tokens_seen": step * session.tokens_per_step,
            "tokens_per_second": rate,
            "wall_seconds": session.elapsed,
            "load": [[round(float(x), 4) for x in layer] for layer in np.asarray(metrics.load)],
        }
        self._log.write(record)
        share = training_flops(session.config, 1) / session.tokens_per_step * rate / self._peak
        train = session.store.train
        self._terminal.step(record, train.bytes / max(len(train.tokens) - 1, 1), share)

    def paused(self) -> "_Recorder":
        """A context whose time does not count as training."""
        return self

    def __enter__(self) -> None:
        self._pause = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._mark += time.monotonic() - self._pause


def finish(session: Session) -> dict[str, Any]:
    """Score the best checkpoint on the whole validation stream, and write the summary of the run."""
    best = session.checkpoints.best()
    assert best is not None, "the last step is always saved"
    params = session.state.params
    if best.step != int(session.state.step):
        params = restore(best, {"params": params})["params"]
    scored = session.score(session.store.valid.tokens, params)
    result = summary(session, scored, best.step, whole_stream=True)
    session.folder.write_summary(result)
    return result


def summary(session: Session, scored: Evaluation, best_step: int, whole_stream: bool) -> dict[str, Any]:
    """What summary.json holds. `val_*` are of the best checkpoint, on the whole validation stream at the end of a
    run and on its fixed part before."""
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
        "train_drop_fraction": last.get("drop_fraction"),
        "val_drop_fraction": scored.drop_fraction,
        "balance_loss": last.get("balance_loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "wall_seconds": session.elapsed,
        "device": f"{device.platform}: {device.device_kind}",
        "precision": session.policy.compute,
        "resumed_from": session.resumed_from,
    }


def last_train_record(metrics: Path) -> dict[str, Any]:
    """The newest record of the training split in a metrics.jsonl."""
    import json

    if not metrics.exists():
        return {}
    records = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    return next((r for r in reversed(records) if r["split"] == "train"), {})
