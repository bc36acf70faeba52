"""What `train.py` prints: the run on one page before training (--dry-run stops there), and its result afterwards."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

import jax
from rich.table import Table

from moe_jax.config import SECTIONS, MeshShape, ModelConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.config.section import flag_of
from moe_jax.data.token_store import Split
from moe_jax.model.costs import (
    HIGHEST,
    LOWEST,
    USEFUL_PASSES,
    ExpectedTime,
    adapter_parameters,
    count_parameters,
    least_activation_bytes,
    least_gradient_bytes,
    totals,
    training_flops,
)
from moe_jax.model.low_rank import LoraShape
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.model.transformer import abstract_adapted, abstract_model
from moe_jax.system import machine
from moe_jax.system.environment import MIB, unused_card
from moe_jax.system.terminal import rich_console, say
from moe_jax.training.optimizers.factory import make_optimizer, state_bytes, warmup_steps
from moe_jax.training.session import Session


def print_run_header(session: Session, notes: list[str]) -> None:
    """Print the notes, and the data, model, precision, memory and plan of the run."""
    config, store, programs = session.config, session.data.store, session.programs
    say(*unused_card(jax.devices()[0].platform), *notes, *session.notes)
    rows = {
        "run": f"{session.folder.path} (preset {config.preset})",
        "data": f"{store.source}: {_split_line(store.train)} to train on; {_split_line(store.valid)} to validate",
        "tokenizer": f"{store.tokenizer.kind}, {store.tokenizer.vocab_size:,} entries, "
        f"{store.valid.target_bytes / store.valid.targets:.2f} bytes a token",
        **_model_rows(config),
        "precision": str(programs.policy),
        **({"attention": programs.attention.reason} if programs.attention.reason else {}),
        "memory": memory_line(config, programs.policy, session.state.params, session.state.trained),
        **({"mesh": _mesh_line(session)} if programs.layout else {}),
        "plan": plan_line(config.train, config.tokens_per_step, len(store.train.tokens)),
        "arithmetic": _arithmetic_line(config),
    }
    if session.data.baselines:
        rows["to compare"] = session.data.baselines.describe()
    if store.valid.answers is not None:
        rows["loss"] = f"on the answers only, {store.train.targets:,} of the training tokens"
    if sentences := advice(config, len(store.train.tokens), store.train.bytes):
        rows["advice"] = "\n".join(sentences)
    _print_rows(rows)


def print_dry_run(config: RunConfig) -> None:
    """Print what differs from the preset, all settings, and what the run would cost."""
    console = rich_console()
    console.print(f"[bold]dry run[/bold] of {config.run_dir}: nothing is trained, nothing is written\n")
    changes = {
        f"  {flag_of(section, name)} {_shown(value)}": f"(preset {_shown(start)})"
        for (section, name, value), (*_, start) in zip(config.settings(), preset(config.preset).settings(), strict=True)
        if value != start
    }
    if changes:
        console.print(f"[bold]settings that differ from preset {config.preset}[/bold]")
        _print_rows(changes)
    else:
        console.print(f"no setting differs from preset {config.preset}")
    console.print("\n[bold]all settings[/bold]")
    sections = {name: config.section(name).plain_fields() for name in SECTIONS}
    _print_rows({f"  {s}": ", ".join(f"{name} {_shown(v)}" for _, name, v in fields) for s, fields in sections.items()})
    console.print("\n[bold]costs[/bold]")
    sized, policy = with_vocabulary(config), choose_policy(config.execution.compute_dtype)
    lora, rate = LoraShape.of(sized.train), machine.matmul_rate(policy.compute)
    _, params = abstract_model(sized.model, policy.compute, sized.train.param_dtype)
    trained = params if lora is None else abstract_adapted(sized.model, lora)[1]
    rows = {
        **_model_rows(sized),
        "precision": str(policy),
        "memory": memory_line(sized, policy, params, trained)
        + "; `uv run --extra gpu-plan python -m moe_jax plan` computes the memory of the whole step for a card",
        "plan": plan_line(sized.train, sized.tokens_per_step),
        "arithmetic": _arithmetic_line(sized),
        "time": f"{ExpectedTime.of(sized, rate)}, if training reaches {LOWEST:.0%} to {HIGHEST:.0%} of "
        f"{rate / 1e9:,.0f} GFLOP/s, the {policy.compute} matmul rate of this machine, measured now; compiling, "
        "evaluations and checkpoints come on top",
    }
    _print_rows(rows)


def advice(config: RunConfig, tokens: int, size: int) -> list[str]:
    """Sentences about the steps and the preset, for a training text of some tokens and bytes. Empty if both fit.

    Nothing is said of conversations: only the few tokens of their answers are learned, so they are read more often.
    """
    train, step, said = config.train, config.tokens_per_step, []
    passes = train.steps * step / tokens
    if config.data.format == "chat":
        return said
    if passes > USEFUL_PASSES:
        fewer = max(1, round(USEFUL_PASSES * tokens / step))
        said.append(
            f"{train.steps:,} steps read this text {passes:.1f} times; passes after the first {USEFUL_PASSES} teach "
            f"less and less. --steps {fewer} reads it {fewer * step / tokens:.0f} times"
        )
    parameters = totals(count_parameters(config.model)).total
    if parameters > size and config.preset != "nano" and not config.base:
        said.append(
            f"the model has {parameters / 1e6:.1f} M parameters and the text {size / 1e6:.1f} MB: it can learn the "
            "text by heart; --preset nano is the smallest"
        )
    return said


def _print_rows(rows: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    rich_console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _split_line(split: Split) -> str:
    documents = f"{split.documents:,} document{'s' * (split.documents != 1)}"
    return f"{documents} ({split.bytes / 1e6:.1f} MB, {len(split.tokens):,} tokens)"


def _model_rows(config: RunConfig) -> dict[str, str]:
    rows = {"model": model_line(config.model), "parameters": parameter_line(config.model)}
    return rows | ({"adapters": _adapter_line(config)} if config.train.lora_rank else {})


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


def parameter_line(m: ModelConfig) -> str:
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


def memory_line(config: RunConfig, policy: Policy, params: Any, trained: Any) -> str:
    """The memory of a training step by its arrays. `params` are the weights of the model and `trained` those that have
    a gradient, as arrays or shapes. It is a lower bound."""
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(trained))
    adapted = jax.tree.structure(params) != jax.tree.structure(trained)
    weights = sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(params)) + 4 * count * adapted
    gradients = least_gradient_bytes(config, policy.compute) * count
    state = round(state_bytes(make_optimizer(config.train), trained) * count)
    arrays = weights + gradients + state
    least = arrays + least_activation_bytes(config, policy.compute)
    bound = "at least " if gradients < 4 * count else ""
    accumulated = " (a second copy while they accumulate)" if config.train.grad_accum > 1 else ""
    return (
        f"at least {_mib(least)} in a training step: weights {'and adapters ' * adapted}{_mib(weights)}, "
        f"gradients {bound}{_mib(gradients)}{accumulated}, state of {config.train.optimizer} {_mib(state)}, then "
        "activations"
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 10 * MIB else f"{size / MIB:,.0f} MiB"


def _mesh_line(session: Session) -> str:
    """The devices that train together, and what each of them keeps between steps."""
    shape = MeshShape.parse(session.config.execution.mesh)
    leaves = jax.tree.leaves((session.state.params, session.state.optimizer))
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / MIB
    whole = sum(x.size * x.dtype.itemsize for x in leaves) / MIB
    sequences = session.config.train.batch_size // shape.devices
    line = (
        f"{shape.devices} devices, {shape}: {sequences} sequence{'s' * (sequences != 1)} of a micro-batch on each, and "
        f"{here:,.1f} of {whole:,.1f} MiB of parameters and optimizer state; evaluation needs all parameters on each"
    )
    model = session.config.model
    if model.dense == "none" and model.dropless and shape.expert > 1:
        rows, pairs = model.device_rows(shape.expert), model.seq_len * model.routing.top_k
        line += f"; the experts of a device take at most {rows:,} of the {pairs:,} choices of a sequence"
    return line


def plan_line(t: TrainConfig, tokens_per_step: int, corpus: int | None = None) -> str:
    """The steps and the learning rate. `corpus` is the number of training tokens, if it is known."""
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


def _arithmetic_line(config: RunConfig) -> str:
    formula = "6 x active matmul parameters x tokens"
    if config.train.lora_rank:
        formula = "4 x active matmul parameters x tokens, and 6 x those of the adapters"
    formula += ", and Muon's own products" * (config.train.optimizer == "muon")
    return f"{training_flops(config, config.train.steps):.2e} floating-point operations: {formula}"


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
    dropped = ""
    if drops := result["train_drop_fraction"]:
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
