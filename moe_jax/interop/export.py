"""Export of a run into a folder for other programs. The folder is whole or absent. What a killed export leaves beside
it is removed by the next one of the same name."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import UserError
from moe_jax.interop import gguf_file, huggingface
from moe_jax.interop.architectures import Architecture, ExportDtype, ExportTarget, architecture_of
from moe_jax.interop.source import ExportSource
from moe_jax.interop.tokenizers import modelfile, tokenizer_files
from moe_jax.model.costs import count_parameters, totals, training_flops
from moe_jax.runs.arrays import SafetensorsWriter
from moe_jax.system.files import json_text, out_folder

LAYOUT = """\
# The layout of model.safetensors

| name | shape | what |
|---|---|---|
| embedding | [V, D] | rows of tokens |
| position | [T, D] | learned positions, where there are any |
| blocks.N.attention_norm, ffn_norm: scale, bias | [D] | LayerNorm or RMSNorm before each half |
| blocks.N.attention.qkv, qkv_bias | [D, (H + 2 KV) A] | x @ qkv is (q, k, v), each of (head, entry) |
| blocks.N.attention.out, out_bias | [H A, D], [D] | output projection |
| blocks.N.attention.query_norm, key_norm: scale | [A], or all heads | RMSNorm before the rotation |
| blocks.N.ffn.router | [D, E] | scores of the experts; the best K, softmax over these K |
| blocks.N.ffn.balance_bias | [E] | added when experts are chosen, and only then |
| blocks.N.ffn.experts.w_in, w_gate | [E, D, F] | gelu(x w_in) in the tanh form, or silu(x w_gate) * (x w_in) |
| blocks.N.ffn.experts.w_out | [E, F, D] | output of an expert |
| blocks.N.ffn.shared | [1, D, F'], [1, F', D] | experts without routing |
| blocks.N.ffn.shared_gate | [D] | their output is multiplied with sigmoid(x . shared_gate) |
| norm: scale, bias | [D] | before the head |
| head | [D, V] | where it is not the embedding |

Rotary positions rotate the pairs (i, i + A/2) of a head. `settings.json` has the sizes, the base `rope_theta`, the
`rope_scaling` as transformers names it, and
`norm_eps`, where 0 stands for 1e-6 with RMSNorm and 1e-5 with LayerNorm.
"""


def check_exportable(source: ExportSource, to: ExportTarget) -> Architecture | None:
    """The architecture of an export; None for plain safetensors. Raises UserError if the model does not fit."""
    if to == "safetensors":
        return None
    architecture = architecture_of(source.config.model)
    if to in ("gguf", "both"):
        if source.config.model.rope_scaling:
            raise UserError(f"--to {to}: the file would have no scaled rotation (model.rope_scaling); take --to hf")
        if architecture.gguf is None:
            raise UserError(f"--to {to}: {architecture.gguf_problem}")
        gguf_file.check_installed()
    return architecture


def export(source: ExportSource, to: ExportTarget, dtype: ExportDtype, out: Path, command: str) -> list[Path]:
    """Write the model, its tokenizer and its card into the new folder `out`. Returns the paths of the files.

    Raises UserError where the model does not fit the target, or the disk is full; nothing is left then.
    """
    architecture = check_exportable(source, to)
    texts = _texts(source, architecture, to, dtype)
    with out_folder(out, "exported") as draft:
        if to != "gguf":
            _write_weights(draft / "model.safetensors", source, architecture, dtype)
        if architecture is not None and to in ("gguf", "both"):
            gguf_file.write_gguf(draft / "model.gguf", source, architecture, out.name, dtype)
        files = sorted([*texts, *(path.name for path in draft.iterdir())])
        for name, text in (texts | {"README.md": model_card(source, out.name, command, files)}).items():
            (draft / name).write_bytes(text.encode())
    return sorted(out.iterdir())


def _texts(
    source: ExportSource, architecture: Architecture | None, to: ExportTarget, dtype: ExportDtype
) -> dict[str, str]:
    """Name -> content of the files beside the weights."""
    config, tokenizer = source.config, source.tokenizer
    texts = {} if to == "gguf" else tokenizer_files(tokenizer, config.model.seq_len, source.tuned)
    if architecture is None:
        texts |= {"LAYOUT.md": LAYOUT, "settings.json": _json(config.to_dict())}
    elif to != "gguf":
        ends = {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}
        texts["config.json"] = _json(huggingface.config_json(source, architecture, dtype))
        texts["generation_config.json"] = _json(ends | {"do_sample": True, "temperature": 0.8})
    if to in ("gguf", "both"):
        texts["Modelfile"] = modelfile(tokenizer, source.tuned)
    return texts


def _json(content: dict[str, Any]) -> str:
    return json_text(content, indent=2) + "\n"


def _write_weights(path: Path, source: ExportSource, architecture: Architecture | None, dtype: ExportDtype) -> None:
    """One tensor after another: a large model does not fit the memory twice."""

    def tensors(source: ExportSource) -> Iterator[tuple[str, np.ndarray]]:
        if architecture is None:
            return ((name, source.array(name)) for name in source.weights)
        return huggingface.tensors(source, architecture)

    kind = np.dtype(dtype)  # jax has registered bfloat16
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, kind) for name, tensor in tensors(source.hollow())}
    with SafetensorsWriter(path, shapes, {"format": "pt"}) as writer:
        for _, tensor in tensors(source):
            writer.add(tensor.astype(kind))


def model_card(source: ExportSource, name: str, command: str, files: list[str]) -> str:
    """The model card, in Markdown, from the run's own summary. What the summary does not say is left out.

    `files` are the names of the exported files. Only with config.json can the library transformers open them.
    """
    config, summary = source.config, source.summary
    counts, model = totals(count_parameters(config.model)), config.model
    steps = source.checkpoint.step  # the exported checkpoint may be an earlier one than the last
    experts = f"{model.experts} of {model.expert_hidden}, top-{model.routing.top_k}"
    separator = f"token {source.tokenizer.separator_id}" if source.tokenizer.kind == "hf" else "`<|endoftext|>`"
    facts = {
        "parameters": f"{counts.total:,}, of which {counts.active:,} are active for a token",
        "shape": f"{model.layers} layers of width {model.width}, {model.heads} heads, context {model.seq_len}",
        "experts": experts if model.dense == "none" else f"none: a dense feed-forward network of {model.dense_hidden}",
        "tokenizer": f"{source.tokenizer.kind}, {source.tokenizer.vocab_size:,} entries; a text begins and ends with "
        + separator,
        "trained on": config.data.source,
        "training": f"{steps * config.tokens_per_step:,} tokens in {steps:,} steps, "
        f"{training_flops(config, steps):.2e} floating-point operations",
        "score": _score(summary),
        "routing": _routing(summary),
        "checkpoint": f"step {steps}",
        "exported by": f"`{command}`",
    }
    table = "".join(f"| {what} | {fact} |\n" for what, fact in facts.items() if fact)
    tags = json_text(["moe-jax", "mixture-of-experts"] if model.dense == "none" else ["moe-jax"])
    library = "library_name: transformers\n" if "config.json" in files else ""
    use = "It goes on with a text; it does not follow instructions."
    if source.tuned:
        use = (
            "It is fine-tuned on conversations: it answers a user, in the format of its chat template. Its loss is "
            "measured on the answers only."
        )
    return (
        f"---\n{library}pipeline_tag: text-generation\ntags: {tags}\n---\n\n"
        f"# {name}\n\nA small language model trained with moe-jax. {use}\n\n| what | value |\n|---|---|\n"
        f"{table}\n{_usage(source, name, files)}"
        f"Generation and evaluation drop no token, here and there. Files: {', '.join(f'`{f}`' for f in files)}.\n"
    )


def _usage(source: ExportSource, name: str, files: list[str]) -> str:
    """Code that writes a text, for each program that the files are for; and the licence."""
    prompt, code = source.summary.get("opening") or "Once upon a time", ""
    if "config.json" in files and not source.tuned:
        call = f'write({prompt!r}, max_new_tokens=200)[0]["generated_text"]'
        made = f"from transformers import pipeline\n\nwrite = pipeline('text-generation', {name!r})\nprint({call})"
        code += f"```python\n{made}\n```\n\n"
    if "Modelfile" in files:
        code += f"```sh\nollama create {shlex.quote(name)} -f Modelfile && ollama run {shlex.quote(name)}\n```\n\n"
    licence = "Licence: moe-jax asks for none. Name yours here, after a look at the licence of the training text."
    if source.config.data.source == "stories":
        licence = "The training text is written by a grammar of moe-jax, under the MIT licence."
    return f"{code}{licence}\n\n"


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
