"""What a person reads beside an exported model: the model card, and ollama's Modelfile."""

from typing import Any

from moe_jax.interop.source import ExportSource
from moe_jax.model.costs import count_parameters, totals, training_flops
from moe_jax.system.files import json_text

MODELFILE = 'FROM ./model.gguf\nTEMPLATE "{{ .Prompt }}"\n'
"""For `ollama create NAME -f Modelfile`. The template adds nothing: the model goes on with the prompt."""


def model_card(source: ExportSource, name: str, command: str, files: list[str]) -> str:
    """The model card, in Markdown, from the run's own summary. What the summary does not say is left out.

    `files` are the names of the exported files. Only with config.json can the library transformers open them.
    """
    config, summary = source.config, source.summary
    counts, model = totals(count_parameters(config.model)), config.model
    facts: dict[str, Any] = {
        "parameters": f"{counts.total:,}, of which {counts.active:,} are active for a token",
        "shape": f"{model.layers} layers of width {model.width}, {model.heads} heads, context {model.seq_len}",
        "experts": f"{model.experts} of {model.expert_hidden}, top-{model.routing.top_k}"
        if model.dense == "none"
        else f"none: a dense feed-forward network of {model.dense_hidden}",
        "tokenizer": f"{source.tokenizer.kind}, {source.tokenizer.vocab_size:,} entries; a text begins and ends with "
        + ("`<|endoftext|>`" if source.tokenizer.kind != "hf" else f"token {source.tokenizer.separator_id}"),
        "trained on": config.data.source,
        "training": _training(source),
        "score": _score(summary),
        "routing": _routing(summary),
        "checkpoint": f"step {source.checkpoint.step}",
        "exported by": f"`{command}`",
    }
    table = "".join(f"| {what} | {fact} |\n" for what, fact in facts.items() if fact)
    tags = json_text(["moe-jax", "mixture-of-experts"] if model.dense == "none" else ["moe-jax"])
    library = "library_name: transformers\n" if "config.json" in files else ""
    return (
        f"---\n{library}pipeline_tag: text-generation\ntags: {tags}\n---\n\n"
        f"# {name}\n\nA small language model trained with moe-jax. {_use(source)}\n\n| what | value |\n|---|---|\n"
        f"{table}\n"
        f"Generation and evaluation drop no token, here and there. Files: {', '.join(f'`{f}`' for f in files)}.\n"
    )


def _use(source: ExportSource) -> str:
    if source.tuned:
        return (
            "It is fine-tuned on conversations: it answers a user, in the format of its chat template. Its loss is "
            "measured on the answers only."
        )
    return "It goes on with a text; it does not follow instructions."


def _training(source: ExportSource) -> str:
    """Of this run, up to the exported checkpoint, which may be an earlier one than the last."""
    config, steps = source.config, source.checkpoint.step
    tokens = steps * config.tokens_per_step
    return f"{tokens:,} tokens in {steps:,} steps, {training_flops(config, steps):.2e} floating-point operations"


def _score(summary: dict[str, Any]) -> str:
    bits = summary.get("val_bits_per_byte")
    if bits is None:
        return ""
    stream = "the whole validation text" if summary.get("val_whole_stream") else "a part of the validation text"
    floor = summary.get("entropy_floor_bits_per_byte")
    return f"{bits:.4f} bits per byte on {stream}" + (f"; no model can be below {floor:.4f}" if floor else "")


def _routing(summary: dict[str, Any]) -> str:
    balance, drops = summary.get("balance_loss"), summary.get("train_drop_fraction")
    if balance is None or drops is None:
        return ""
    return f"balance loss {balance:.3f} at the end (1 is even), {drops:.1%} of the choices dropped in training"
