"""What `train.py` prints: the run on one page before training (--dry-run stops there), and its result afterwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from moe_jax.config import MeshShape, ModelConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.config.section import flag_of
from moe_jax.data.token_store import Split
from moe_jax.model.costs import adapter_parameters, count_parameters, least_step_bytes, totals, training_flops
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.system import machine
from moe_jax.system.environment import MIB, unused_card
from moe_jax.system.terminal import duration, rich_console, say
from moe_jax.training.optimizers.factory import warmup_steps
from moe_jax.training.session import Session

MEMORISED_PASSES = 50
"""Passes over the same conversations from which on a run is warned. After some 130 passes over 38 conversations, `nano`
knew most by heart, and answered a quarter of the new questions (benchmarks/fine-tuning.md)."""
LOWEST, HIGHEST = 0.3, 0.6
"""A training step is expected to reach a share of the matmul rate between these two."""


def print_run_header(session: Session) -> None:
    """Print the run in about a dozen lines of a terminal. `print_dry_run` has the costs too."""
    config, store, programs = session.config, session.data.store, session.programs
    say(*unused_card(jax.devices()[0].platform), *session.notes)
    rows = {
        "run": f"{session.folder.path} (preset {config.preset})",
        "plan": plan_line(config.train, config.tokens_per_step, len(store.train.tokens)),
        "data": f"{store.source}: {_split_line(store.train)} to train on; {_split_line(store.valid)} to validate",
        "tokenizer": f"{store.tokenizer.kind}, {store.tokenizer.vocab_size:,} entries, "
        f"{store.valid.target_bytes / store.valid.targets:.2f} bytes a token",
        **_model_rows(config, programs.policy),
    }
    if session.data.baselines:
        rows["to compare"] = session.data.baselines.describe()
    if programs.attention.reason:
        rows["attention"] = programs.attention.reason
    if programs.layout:
        shape = MeshShape.parse(config.execution.mesh)
        rows["mesh"] = f"{shape.devices} devices, {shape}; evaluation needs all parameters on each"
    if store.valid.answers is not None:
        rows["loss"] = f"on the answers only, {store.train.targets:,} of the training tokens"
        passes = config.train.steps * config.tokens_per_step / len(store.train.tokens)
        if passes > MEMORISED_PASSES:
            rows["beware"] = (
                f"{passes:,.0f} passes over {store.train.documents:,} conversations: the model will know these by "
                "heart and little else; give more conversations, or fewer --steps"
            )
    _print_rows(rows)


def print_dry_run(config: RunConfig) -> None:
    """Print what the run would cost, and what differs from the preset."""
    console = rich_console()
    console.print(f"[bold]dry run[/bold] of {config.run_dir}: nothing is trained, nothing is written\n")
    console.print("[bold]costs[/bold]")
    sized, policy = with_vocabulary(config), choose_policy(config.execution.compute_dtype)
    rate = machine.matmul_rate(policy.compute)
    flops = training_flops(sized, sized.train.steps)
    costs = {
        "groups": ", ".join(f"{name} {n.total:,}" for name, n in count_parameters(sized.model).items()),
        "memory": f"at least {least_step_bytes(sized) / MIB:,.0f} MiB in a training step",
        "plan": plan_line(sized.train, sized.tokens_per_step),
        "arithmetic": f"{flops:.2e} floating-point operations",
        "time": f"{duration(flops / (HIGHEST * rate))} to {duration(flops / (LOWEST * rate))}, "
        f"if training reaches {LOWEST:.0%} to {HIGHEST:.0%} of "
        f"{rate / 1e9:,.0f} GFLOP/s, the {policy.compute} matmul rate of this machine, measured now; compiling, "
        "evaluations and checkpoints come on top",
    }
    _print_rows(_model_rows(sized, policy) | costs)
    pairs = zip(config.settings(), preset(config.preset).settings(), strict=True)
    changed = {
        f"  {flag_of(config.section(section), name)}": f"{value} (preset {start})"
        for (section, name, value), (*_, start) in pairs
        if value != start
    }
    if changed:
        console.print(f"\n[bold]settings that differ from preset {config.preset}[/bold]")
        _print_rows(changed)


def _model_rows(config: RunConfig, policy: Policy) -> dict[str, str]:
    """What a run trains, and in what precision."""
    total = totals(count_parameters(config.model))
    active = f"{total.active:,} active for a token ({total.active / total.total:.0%})"
    rows = {"model": model_line(config.model), "parameters": f"{total.total:,} in all, {active}"}
    if config.train.lora_rank:
        rows["adapters"] = _adapter_line(config)
    return rows | {"precision": str(policy)}


def _print_rows(rows: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    rich_console().print(table)


def _split_line(split: Split) -> str:
    kind = "document" if split.answers is None else "conversation"
    documents = f"{split.documents:,} {kind}{'s' * (split.documents != 1)}"
    return f"{documents} ({split.bytes / 1e6:.1f} MB, {len(split.tokens):,} tokens)"


def model_line(m: ModelConfig) -> str:
    if m.dense == "none":
        limit = "dispatch by blocks"
        if not m.dropless:
            limit = f"capacity factor {m.routing.capacity_factor:g} = {m.capacity} of {m.seq_len} tokens an expert"
        ffn = f"{m.experts} {m.activation} experts of {m.expert_hidden}, top-{m.routing.top_k}, {limit}"
    else:
        ffn = f"dense baseline with the {m.dense} parameters: {m.activation} of {m.dense_hidden}"
    keys = "" if m.key_value_heads == m.heads else f" on {m.key_value_heads} key heads"
    return f"{m.layers} layers of width {m.width}, {m.heads} heads{keys}, context {m.seq_len}; {ffn}"


def _adapter_line(config: RunConfig) -> str:
    train, model = config.train, config.model
    count, whole = adapter_parameters(config).total, totals(count_parameters(model)).total
    experts = f", {max(1, train.lora_rank // model.routing.top_k)} on each expert" if model.dense == "none" else ""
    routers = "trained" if train.train_router else "not trained"
    return (
        f"{count:,} parameters ({count / whole:.1%} of the model), the only ones that are trained: rank "
        f"{train.lora_rank} on attention{experts}, times {train.lora_scale:g}; routers {routers}"
    )


def plan_line(t: TrainConfig, tokens_per_step: int, corpus: int | None = None) -> str:
    """The steps and the learning rate."""
    accumulated = f" x {t.grad_accum} accumulated" if t.grad_accum > 1 else ""
    shape = "a cosine" if t.lr_schedule == "cosine" else "a straight line"
    rate = f"{t.lr:g}" if t.optimizer != "muon" else f"{t.muon_lr:g} (AdamW part {t.lr:g})"
    tokens = t.steps * tokens_per_step
    read = f"{tokens:,} tokens" if corpus is None else f"{tokens / corpus:.2f} epochs"
    return (
        f"{t.steps:,} steps of {t.batch_size}{accumulated} sequences = {tokens_per_step:,} tokens a step, {read}; "
        f"{t.optimizer}, learning rate {rate} after {warmup_steps(t)} steps of warm-up, then {shape} to "
        f"{t.final_lr_ratio:.0%} of that"
    )


def print_result(folder: Path, result: dict[str, Any]) -> None:
    """Print the result of a run: its score, what it cost, and its folder."""
    floor, trigram, bits = (result[f"{name}_bits_per_byte"] for name in ("entropy_floor", "trigram", "val"))
    if trigram is None:
        compared = ", on the answers only"
    elif floor is None:
        compared = f" (trigram model {trigram:.4f})"
    else:
        compared = f", {bits / floor:.3f} x the floor of {floor:.4f} (trigram model {trigram / floor:.2f} x)"
    drops = result["train_drop_fraction"]
    dropped = f"; dropped in training {drops:.1%} (mean of the steps)" if drops else ""
    say(
        f"best checkpoint: step {result['best_step']}, validation loss {result['val_loss']:.4f} nats/token, "
        f"{bits:.4f} bits/byte{compared}, on the whole validation stream, {result['val_tokens']:,} tokens",
        f"{result['tokens_seen']:,} tokens in {result['wall_seconds']:.0f} s{dropped}; everything is in {folder}",
    )
    if trigram is not None and bits > trigram:
        say("this is worse than a trigram model: train longer, with --resume and more --steps")
