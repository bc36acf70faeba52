"""The folder of a public model: its download from the Hugging Face hub, and the shape that its config.json gives.

A field of config.json gives the shape, or must have the one value that our model computes. Other fields are ignored, as
the classes of transformers ignore them. No weight is read, and neither jax nor numpy is imported.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import ConfigError, ModelConfig, RoutingConfig, UserError
from moe_jax.config.rope import KINDS, ORIGINAL
from moe_jax.interop.architectures import FIXED, LAYOUTS, MULTIPLIERS, OLMOE, Architecture, Layout
from moe_jax.system.errors import shortened
from moe_jax.system.files import json_text, parse_json, read_json

CONFIG = "config.json"

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.safetensors*")
"""What is downloaded. Weights in other files are not: reading them could run code."""


def model_folder(source: str) -> Path:
    """The folder `source`; or the model OWNER/NAME of the hub, downloaded. Any other path as it is.

    Raises UserError, with what to do, if the hub cannot be reached or does not give the model.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return Path(source)
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except errors.GatedRepoError:
        raise UserError(
            f"{source}: the hub asks to accept the model's terms first; do so on its page, then log in by "
            "`uvx hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{source}: no such folder, and the hub has no model of this name; check the spelling"
        ) from None
    except Exception as error:  # of many classes, also those of the library that the hub's library uses for HTTP
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"{source}: the hub cannot be reached ({why}); try again, or bring the folder: where there is a network, "
            f"`uvx hf download {source} --local-dir {source.partition('/')[2]}`, and give its path here"
        ) from None


class PretrainedShape(NamedTuple):
    """What config.json says."""

    folder: Path
    architecture: Architecture
    model: ModelConfig
    """`seq_len` is the longest context that the model reads."""
    separator: int | None
    """`eos_token_id`: the token that ends a text."""
    text: bytes
    """The content of config.json."""


def holds_pretrained(folder: Path) -> bool:
    """Whether a folder holds the config.json of a model for transformers, which a folder of a run does not."""
    try:
        return "model_type" in dict(read_json(folder / CONFIG))
    except (OSError, ValueError, TypeError):
        return False


def read_shape(folder: Path, flag: str) -> PretrainedShape:
    """The shape of the model in a folder. Raises ConfigError where there is no such folder, and UserError where its
    config.json cannot be read or is of a model that ours cannot hold."""
    if not folder.is_dir():
        raise ConfigError(
            f"{flag} {folder}: is no folder; name one with config.json, model.safetensors, tokenizer.json "
            "(`uvx hf download OWNER/NAME --local-dir NAME` downloads a model of the hub)"
        )
    try:
        text = (folder / CONFIG).read_bytes()
        values = dict(parse_json(text))
    except FileNotFoundError:
        raise ConfigError(f"{flag} {folder}: has no config.json; name the folder of a Hugging Face model") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({shortened(str(error))}); download it again") from None
    if "schema_version" in values and "model_type" not in values:
        raise ConfigError(
            f"{flag} {folder}: is a run of moe-jax; go on with --resume, or name the folder of a Hugging Face model"
        )
    try:
        return _Fields(values).shape(folder, text)
    except (ConfigError, UserError) as error:  # ConfigError of ModelConfig, by the flag of the field
        raise UserError(f"{folder / CONFIG}: {error}") from None


class _Fields:
    """The fields of config.json, read with their types. A field that is null counts as left out."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    def shape(self, folder: Path, text: bytes) -> PretrainedShape:
        layout = self._layout()
        heads, width = self._size("num_attention_heads"), self._size("hidden_size")
        head_dim = self._size("head_dim", layout.head_dim or width // heads)
        if layout.architecture == OLMOE and head_dim * heads != width:
            raise self._unheld("head_dim", f"hidden_size / num_attention_heads = {width} / {heads}")
        kv_heads = self._size("num_key_value_heads", layout.kv_heads or heads)
        multipliers = {name: self._number(name, 1, 1e-6, 1e6) for name in (MULTIPLIERS if layout.multipliers else ())}
        model = ModelConfig(
            vocab_size=self._size("vocab_size"),
            seq_len=self._context(),
            layers=self._size("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=0 if kv_heads == heads else kv_heads,
            head_size=0 if head_dim == width / heads else head_dim,
            norm_eps=self._number("rms_norm_eps", layout.eps, 1e-12, 1),
            **self._rotation(layout),
            qk_norm=layout.qk_norm,
            tied_head=self._of("tie_word_embeddings", bool, False),
            **multipliers,
            **self._network(layout),
        )
        return PretrainedShape(folder, layout.architecture, model, self._separator(), text)

    def _layout(self) -> Layout:
        layout = LAYOUTS.get(str(self._values.get("model_type")))
        if layout is None:
            raise self._unheld("model_type", "one of " + ", ".join(LAYOUTS))
        name = layout.architecture.class_name
        if self._values.get("architectures", []) not in ([], [name]):
            raise self._unheld("architectures", json.dumps([name]))
        own = {"qkv_bias" if layout.gated else "", *(MULTIPLIERS if layout.multipliers else ())}
        for field, allowed in FIXED.items():
            if field not in own and self._values.get(field, allowed[0]) not in allowed:
                raise self._unheld(field, json.dumps(allowed[0]))
        return layout

    def _network(self, layout: Layout) -> dict[str, Any]:
        """The fields of the feed-forward network: experts, or one dense network of exactly `intermediate_size`."""
        hidden = self._size(layout.hidden)
        if not layout.experts:
            # One expert: then the dense network has its width. See `ModelConfig.dense_hidden`.
            return {"dense": "active", "experts": 1, "expert_hidden": hidden, "routing": RoutingConfig(top_k=1)}
        # transformers 5 writes `num_local_experts` for classes that had `num_experts`.
        names = [name for name in ("num_experts", "num_local_experts") if name in self._values] or [layout.experts]
        experts = self._size(names[0])
        if experts != self._size(names[-1]):
            raise self._unheld(names[0], f"{names[1]} too")
        top_k = self._size("num_experts_per_tok", layout.top_k)
        renormalise = layout.renormalise is None or self._of("norm_topk_prob", bool, layout.renormalise)
        if top_k == 1 and renormalise:
            field = "num_experts_per_tok" if layout.renormalise is None else "norm_topk_prob"
            raise self._unheld(field, "such that the gate of a single expert is its probability")
        # Models of this kind are trained without drops. `blocks` drops nothing.
        routing = RoutingConfig(top_k=top_k, dispatch="blocks", renormalise_gates=renormalise)
        fields = {"experts": experts, "expert_hidden": hidden, "routing": routing}
        if layout.shared:
            fields["shared_experts"], rest = divmod(self._of(layout.shared, int, layout.shared_hidden), hidden)
            if rest:
                raise self._unheld(layout.shared, f"a multiple of {hidden}, the width of an expert")
        if layout.gated:
            fields |= {"shared_gate": True, "qkv_bias": self._of("qkv_bias", bool, True)}
        return fields

    def _context(self) -> int:
        """The longest context: `max_position_embeddings`, or the window of attention if that is shorter."""
        longest, kinds = self._size("max_position_embeddings"), self._of("layer_types", list, [])
        if not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
            raise self._unheld("layer_types", "a list of full_attention")
        slides = self._of("use_sliding_window", bool, True) or "sliding_attention" in kinds
        # A window of W positions is no window at all for a context of at most W.
        return min(longest, self._size("sliding_window", longest)) if slides else longest

    def _rotation(self, layout: Layout) -> dict[str, Any]:
        """The base of the rotation, and how it is scaled. transformers 4 has the base in `rope_theta`, 5 in
        `rope_parameters`."""
        scalings: dict[str, str] = {}
        for field in ("rope_scaling", "rope_parameters"):
            rope = {name: value for name, value in self._of(field, dict, {}).items() if value is not None}
            inner = rope.pop("rope_theta", None)
            if inner is not None and inner != self._values.setdefault("rope_theta", inner):
                problem = f"rope_theta is {_shown(self._values['rope_theta'])}, and {field}.rope_theta {_shown(inner)}"
                raise UserError(f"{problem}; make them equal")
            if rope.pop("partial_rotary_factor", 1) != 1:
                raise self._unheld(field, "without partial_rotary_factor")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if str(kind) in KINDS:
                try:
                    scalings[field] = scaling_text(rope, self._size("max_position_embeddings"))
                except (TypeError, ValueError):
                    raise self._unheld(field, "an object of numbers") from None
            elif kind != "default" or rope.keys() - {"rope_type", "type"}:
                raise self._unheld(field, "of the rope_type default, " + ", ".join(KINDS))
            elif rope:
                scalings[field] = ""
        if len(set(scalings.values())) > 1:
            raise self._unheld("rope_scaling", "the same as rope_parameters")
        rope_scaling = next(iter(scalings.values()), "")
        return {"rope_theta": self._number("rope_theta", layout.theta, 1, 1e9), "rope_scaling": rope_scaling}

    def _separator(self) -> int | None:
        token = self._values.get("eos_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if token is not None and type(token) is not int:
            raise self._unheld("eos_token_id", "a token id, or a list of token ids")
        return token

    def _of[T](self, name: str, kind: type[T], default: T) -> T:
        value = self._values.get(name, default)
        if type(value) is not kind:
            raise self._unheld(name, f"of the type {kind.__name__}")
        return value

    def _size(self, name: str, default: int = 0) -> int:
        """A size of 1 or more. A `default` of 0: the field must be there."""
        size = self._values.get(name, default)
        if type(size) is not int or size < 1:
            raise self._unheld(name, "a whole number from 1")
        return size

    def _number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._values.get(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._unheld(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def _unheld(self, name: str, allowed: str) -> UserError:
        return UserError(f"{name} is {_shown(self._values.get(name))}, and must be {allowed} to be imported")


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, default=str))


def scaling_text(rope: dict[str, Any], longest: int) -> str:
    """What `ModelConfig.rope_scaling` holds for the object `rope_scaling` of a config.json, whose model reads `longest`
    positions. Raises ValueError for a number that is missing, and for a field that is not known."""
    values = {name: value for name, value in rope.items() if value is not None}
    kind = values.pop("rope_type", values.pop("type", None))
    values.pop("type", None)
    numbers = KINDS[kind] | ({ORIGINAL: longest} if kind == "yarn" else {}) | values
    if kind == "yarn":
        one, other = (numbers.pop(name, 0) for name in ("mscale", "mscale_all_dim"))
        growth = 0.1 * math.log(max(numbers["factor"] or 1, 1))
        size = (1 + one * growth) / (1 + other * growth) if one and other else 1 + growth
        numbers["attention_factor"] = values.get("attention_factor", size)
    return json_text({"rope_type": kind} | {name: numbers[name] for name in sorted(numbers)})
