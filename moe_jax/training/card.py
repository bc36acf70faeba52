"""What `train.py` prints before and after: the run on one page, derived quantities with their units."""

from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from moe_jax.analysis.accounting import count_parameters, totals, training_flops
from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.training.loop import Session
from moe_jax.training.optimizer import make_optimizer, state_bytes, warmup_steps


def print_card(session: Session, notes: list[str]) -> None:
    """Data, model, precision, plan."""
    config, store = session.config, session.store
    muon = config.train.optimizer == "muon"
    console = Console(highlight=False)
    for note in (*notes, *session.notes):
        console.print(note, markup=False, soft_wrap=True)
    rows = {
        "run": f"{session.folder.path} (preset {config.preset})",
        "data": f"{store.source}: {store.train.stories:,} stories, {len(store.train.tokens):,} tokens; "
        f"{store.valid.stories:,} for validation",
        "tokenizer": f"{store.tokenizer.kind}, {store.tokenizer.vocab_size:,} entries, "
        f"{store.valid.bytes / (len(store.valid.tokens) - 1):.2f} bytes a token",
        "model": _model_line(config.model),
        "parameters": _parameter_line(config.model),
        "precision": str(session.policy),
        "memory": _memory_line(session),
        "plan": _plan_line(config.train, session.tokens_per_step, len(store.train.tokens)),
        "arithmetic": f"{training_flops(config, config.train.steps):.2e} floating-point operations: "
        "6 x active matmul parameters x tokens" + (", and Muon's own products" if muon else ""),
    }
    if session.references:
        rows["to compare"] = (
            f"{session.references.entropy_floor:.4f} bits/byte is the entropy of the validation stories, below which "
            f"no model can be; {session.references.trigram:.4f} is a word-trigram model"
        )
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def _model_line(m: ModelConfig) -> str:
    if m.dense == "none":
        ffn = (
            f"{m.experts} {m.activation} experts of {m.expert_hidden}, top-{m.top_k}, capacity factor "
            f"{m.capacity_factor:g} = {m.capacity} of {m.seq_len} tokens an expert"
        )
    else:
        ffn = f"dense twin with the {m.dense} parameters: {m.activation} of {m.dense_hidden}"
    return f"{m.layers} layers of width {m.width}, {m.heads} heads, context {m.seq_len}; {ffn}"


def _parameter_line(m: ModelConfig) -> str:
    groups = count_parameters(m)
    total = totals(groups)
    parts = ", ".join(f"{name} {count.total:,}" for name, count in groups.items())
    return f"{total.total} in all, {total.active} active for a token ({total.active / total.total:.0%}): {parts}"


def _memory_line(session: Session) -> str:
    params = jax.tree.leaves(session.state.params)
    weights = sum(p.size * p.dtype.itemsize for p in params) / sum(p.size for p in params)
    state = state_bytes(make_optimizer(session.config.train), session.state.params)
    kind = session.config.train.optimizer
    return f"{weights:.2f} bytes a parameter, as many for its gradient, and {state:.2f} for the state of {kind}"


def _plan_line(t: TrainConfig, tokens_per_step: int, corpus: int) -> str:
    accumulated = f" x {t.grad_accum} accumulated" if t.grad_accum > 1 else ""
    shape = "a cosine" if t.decay == "cosine" else "a straight line"
    rate = f"{t.lr:g}" if t.optimizer != "muon" else f"{t.muon_lr:g} (AdamW part {t.lr:g})"
    return (
        f"{t.steps:,} steps of {t.batch_size}{accumulated} sequences = {tokens_per_step:,} tokens a step, "
        f"{t.steps * tokens_per_step / corpus:.2f} epochs; {t.optimizer}, learning rate {rate} after "
        f"{warmup_steps(t)} steps of warm-up, then {shape} to {t.final_lr:.0%} of that"
    )


def print_result(session: Session, result: dict[str, Any]) -> None:
    """The end of a run: what it scored, where it lies, and how to make it talk."""
    console = Console(highlight=False)
    floor = result["entropy_floor_bits_per_byte"]
    compared = ""
    if floor is not None:
        compared = (
            f", {result['val_bits_per_byte'] / floor:.3f} x the floor of {floor:.4f} "
            f"(trigram {result['trigram_bits_per_byte'] / floor:.2f} x)"
        )
    lines = [
        f"best checkpoint: step {result['best_step']}, validation loss {result['val_loss']:.4f} nats/token, "
        f"{result['val_bits_per_byte']:.4f} bits/byte{compared}",
        f"{result['tokens_seen']:,} tokens in {result['wall_seconds']:.0f} s; everything is in {session.folder.path}",
        f'next: uv run python -m moe_jax generate --run {session.folder.path} --prompt "Once upon a time"',
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
