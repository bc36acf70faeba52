"""The text that `train.py` prints before training (the run on one page) and after training (the result)."""

import math
import shlex
from typing import Any

import jax
from rich.table import Table

from moe_jax.config import MeshShape, ModelConfig, RunConfig, TrainConfig
from moe_jax.data.token_store import Split
from moe_jax.model.costs import adapter_parameters, count_parameters, totals, training_flops
from moe_jax.system.environment import unused_card
from moe_jax.system.terminal import rich_console, say
from moe_jax.training.advice import advice
from moe_jax.training.optimizers.factory import warmup_steps
from moe_jax.training.session import Session
from moe_jax.training.step_bytes import StepBytes


def print_run_header(session: Session, notes: list[str], step_mib: float | None = None) -> None:
    """Print the notes, and the data, model, precision, memory and plan of the run. `step_mib` is the memory of the
    compiled training step, if it is known by now."""
    config, store = session.config, session.data.store
    muon = config.train.optimizer == "muon"
    console = rich_console()
    say(*unused_card(jax.devices()[0].platform), *notes, *session.notes)
    rows = {
        "run": f"{session.folder.path} (preset {config.preset})",
        "data": f"{store.source}: {_split_line(store.train)} to train on; {_split_line(store.valid)} to validate",
        "tokenizer": f"{store.tokenizer.kind}, {store.tokenizer.vocab_size:,} entries, "
        f"{store.valid.target_bytes / store.valid.targets:.2f} bytes a token",
        "model": _model_line(config.model),
        "parameters": _parameter_line(config.model),
        **({"adapters": _adapter_line(config)} if config.train.lora_rank else {}),
        "precision": str(session.programs.policy),
        **({"attention": reason} if (reason := session.programs.attention.reason) else {}),
        "memory": _memory_line(session, step_mib),
        **({"mesh": _mesh_line(session)} if session.programs.layout else {}),
        "plan": _plan_line(config.train, session.config.tokens_per_step, len(store.train.tokens)),
        "arithmetic": f"{training_flops(config, config.train.steps):.2e} floating-point operations: "
        + ("4 x active matmul parameters x tokens, and 6 x those of the adapters" if config.train.lora_rank else "")
        + ("" if config.train.lora_rank else "6 x active matmul parameters x tokens")
        + (", and Muon's own products" if muon else ""),
    }
    if session.data.baselines:
        rows["to compare"] = session.data.baselines.describe()
    if store.valid.answers is not None:
        rows["loss"] = f"on the answers only, {store.train.targets:,} of the training tokens"
    if said := advice(config, len(store.train.tokens), store.train.bytes):
        rows["advice"] = "\n".join(said)
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def _split_line(split: Split) -> str:
    documents = f"{split.documents:,} document{'s' * (split.documents != 1)}"
    return f"{documents} ({split.bytes / 1e6:.1f} MB, {len(split.tokens):,} tokens)"


def _model_line(m: ModelConfig) -> str:
    if m.dense == "none":
        limit = "dispatch by blocks"
        if not m.dropless:
            limit = f"capacity factor {m.routing.capacity_factor:g} = {m.capacity} of {m.seq_len} tokens an expert"
        ffn = f"{m.experts} {m.activation} experts of {m.expert_hidden}, top-{m.routing.top_k}, {limit}"
    else:
        ffn = f"dense baseline with the {m.dense} parameters: {m.activation} of {m.dense_hidden}"
    keys = "" if m.key_value_heads == m.heads else f" on {m.key_value_heads} key heads"
    return f"{m.layers} layers of width {m.width}, {m.heads} heads{keys}, context {m.seq_len}; {ffn}"


def _parameter_line(m: ModelConfig) -> str:
    groups = count_parameters(m)
    total = totals(groups)
    parts = ", ".join(f"{name} {count.total:,}" for name, count in groups.items())
    return f"{total.total:,} in all, {total.active:,} active for a token ({total.active / total.total:.0%}): {parts}"


def _adapter_line(config: RunConfig) -> str:
    train, model = config.train, config.model
    count, whole = adapter_parameters(config).total, totals(count_parameters(model)).total
    experts = f", {max(1, train.lora_rank // model.routing.top_k)} on each expert" if model.dense == "none" else ""
    routers = "trained" if train.train_router else "not trained"
    return (
        f"{count:,} parameters ({count / whole:.1%} of the model), the only ones that are trained: rank "
        f"{train.lora_rank} on attention{experts}, times {train.lora_scale:g}; routers {routers}"
    )


def _memory_line(session: Session, step_mib: float | None) -> str:
    """`step_mib` is what XLA's plan of the compiled step says, if it is known. Else there is only a lower bound."""
    params, trained = session.state.params, session.state.trained
    step = StepBytes.of(session.config, session.programs.policy, params, trained, session.programs.optimizer)
    leaves = jax.tree.leaves(params)
    weights = sum(p.size * p.dtype.itemsize for p in leaves) / sum(p.size for p in leaves)
    size = f"at least {step.least / 2**20:,.0f} MiB" if step_mib is None else f"{step_mib:,.0f} MiB"
    each = step.gradients / step.trained
    least = "at least " if each < 4 else ""
    state = f"{step.state / step.trained:.2f} for the state of {session.config.train.optimizer}"
    line = f"{size} in a training step; {weights:.2f} bytes a parameter"
    if session.state.adapters is not None:
        return (
            f"{line}. Only adapters have a gradient, {least}{each:.0f} bytes for each of their parameters, and {state}"
        )
    return f"{line}, {least}{each:.0f} for its gradient, and {state}"


def _mesh_line(session: Session) -> str:
    """The devices that train together, and what each of them keeps between steps."""
    shape = MeshShape.parse(session.config.execution.mesh)
    leaves = jax.tree.leaves((session.state.params, session.state.optimizer))
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / 2**20
    whole = sum(x.size * x.dtype.itemsize for x in leaves) / 2**20
    sequences = session.config.train.batch_size // shape.devices
    line = (
        f"{shape.devices} devices, {shape}: {sequences} sequence{'s' * (sequences != 1)} of a micro-batch on each, and "
        f"{here:,.1f} of {whole:,.1f} MiB of parameters and optimizer state"
    )
    model = session.config.model
    if model.dense == "none" and model.dropless and shape.expert > 1:
        rows, pairs = model.device_rows(shape.expert), model.seq_len * model.routing.top_k
        line += f"; the experts of a device take at most {rows:,} of the {pairs:,} choices of a sequence"
    return line


def _plan_line(t: TrainConfig, tokens_per_step: int, corpus: int) -> str:
    accumulated = f" x {t.grad_accum} accumulated" if t.grad_accum > 1 else ""
    shape = "a cosine" if t.lr_schedule == "cosine" else "a straight line"
    rate = f"{t.lr:g}" if t.optimizer != "muon" else f"{t.muon_lr:g} (AdamW part {t.lr:g})"
    return (
        f"{t.steps:,} steps of {t.batch_size}{accumulated} sequences = {tokens_per_step:,} tokens a step, "
        f"{t.steps * tokens_per_step / corpus:.2f} epochs; {t.optimizer}, learning rate {rate} after "
        f"{warmup_steps(t)} steps of warm-up, then {shape} to {t.final_lr_ratio:.0%} of that"
    )


def print_result(session: Session, result: dict[str, Any]) -> None:
    """Print the result of a run: its score, what it cost, and its folder."""
    floor, names = result["entropy_floor_bits_per_byte"], ("unigram", "trigram", "kneser_ney_5gram")
    unigram, trigram, five = (result[f"{name}_bits_per_byte"] for name in names)
    if unigram is None:
        compared = ", on the answers only"
    elif floor is None:
        compared = f" (word unigram {unigram:.4f}, trigram {trigram:.4f}, 5-gram {five:.4f})"
    else:
        compared = (
            f", {result['val_bits_per_byte'] / floor:.3f} x the floor of {floor:.4f} "
            f"(5-gram {five / floor:.2f} x, trigram {trigram / floor:.2f} x)"
        )
    drops = result["train_drop_fraction"]
    dropped = ""
    if drops:
        worst, last = result["train_drop_fraction_worst"], result["train_drop_fraction_last"]
        dropped = f"; dropped in training {drops:.1%} (mean of the steps), {worst:.1%} (worst), {last:.1%} (last)"
    lines = [
        f"best checkpoint: step {result['best_step']}, validation loss {result['val_loss']:.4f} nats/token, "
        f"{result['val_bits_per_byte']:.4f} bits/byte{compared}, on the whole validation stream, "
        f"{result['val_tokens']:,} tokens",
        f"{result['tokens_seen']:,} tokens in {result['wall_seconds']:.0f} s{dropped}; everything is in "
        f"{session.folder.path}",
    ]
    if unigram is not None and result["val_bits_per_byte"] > unigram:
        lines.append("this is worse than counting words (the unigram): train longer, with --resume and more --steps")
    say(*lines)


def print_next_step(session: Session) -> None:
    """Print the command that opens a conversation with the model."""
    print(f"next: uv run python -m moe_jax chat --run {shlex.quote(str(session.folder.path))}")
