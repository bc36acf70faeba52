"""The shape of a model in a Hugging Face folder, from its config.json. Standard library only: no weight is read.

A field of config.json gives the shape, or must have the one value that our model computes. Other fields are ignored, as
the classes of transformers ignore them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import ConfigError, ModelConfig, RoutingConfig, UserError
from moe_jax.config.rope import KINDS, scaling_text
from moe_jax.interop.architectures import OLMOE, Architecture
from moe_jax.interop.config_fields import FIXED, LAYOUTS, MULTIPLIERS, Layout
from moe_jax.interop.model_folder import read_file
from moe_jax.system.errors import shortened
from moe_jax.system.files import parse_json

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 2**22
_LARGEST = 2**24
"""Largest size that is taken. `ModelConfig` has narrower bounds of its own."""


class Multipliers(NamedTuple):
    """Factors that a class of transformers multiplies with (Granite), and that our model has in its weights."""

    embedding: float = 1.0
    queries: float = 1.0
    """The scale of attention scores, divided by the usual 1 / sqrt(A)."""
    residual: float = 1.0
    """Of what attention and experts add to the residual stream."""
    head: float = 1.0

    def of(self, parameter: str, tensor: str) -> float:
        """The factor of a tensor in one of our parameters."""
        if parameter in ("embedding", "head"):
            return getattr(self, parameter)
        if ".q_proj." in tensor:
            return self.queries
        return self.residual if parameter.endswith((".out", ".w_out")) else 1.0


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
    tied: bool
    """Whether the head in the folder is the embedding. Ours is not where their factors differ."""
    multipliers: Multipliers = Multipliers()


def holds_pretrained(folder: Path) -> bool:
    """Whether a folder holds the config.json of a model for transformers, which a folder of a run does not."""
    try:
        values = parse_json(read_file(folder, CONFIG, _MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def read_shape(folder: Path, flag: str) -> PretrainedShape:
    """The shape of the model in a folder. Raises ConfigError where there is no such folder, and UserError where its
    config.json cannot be read or is of a model that ours cannot hold."""
    if not folder.is_dir():
        download = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):  # OWNER/NAME, as the hub has it
            download = f"; `uvx hf download {folder} --local-dir {folder.name}` downloads the model of that name"
        raise ConfigError(
            f"{flag} {folder}: is no folder; name one with config.json, model.safetensors, tokenizer.json{download}"
        )
    try:
        text = read_file(folder, CONFIG, _MAX_CONFIG_BYTES)
        values = parse_json(text)
    except FileNotFoundError:
        raise ConfigError(f"{flag} {folder}: has no config.json; name the folder of a Hugging Face model") from None
    except OSError as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: is not JSON ({str(error)[:80]}); download the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG}: is not a JSON object; download the file again")
    if "schema_version" in values and "model_type" not in values:
        raise ConfigError(
            f"{flag} {folder}: is a run of moe-jax; go on with --resume, or name the folder of a Hugging Face model"
        )
    try:
        return _Reader(values).shape(folder, text)
    except (ConfigError, UserError) as error:  # ConfigError of ModelConfig, by the flag of the field
        raise UserError(f"{folder / CONFIG}: {error}") from None


class _Reader:
    """The fields of config.json, read with their types."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def shape(self, folder: Path, text: bytes) -> PretrainedShape:
        layout = self._layout()
        self._check_fields(layout)
        heads = self._size("num_attention_heads")
        width = self._size("hidden_size")
        head_dim = self._size("head_dim", layout.head_dim or width // heads or None)
        if layout.architecture == OLMOE and head_dim * heads != width:
            raise self._unheld("head_dim", f"hidden_size / num_attention_heads = {width} / {heads}")
        tied, multipliers = self._switch("tie_word_embeddings", False), self._multipliers(layout, head_dim)
        model = ModelConfig(
            vocab_size=self._size("vocab_size"),
            seq_len=self._context(),
            layers=self._size("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=self._own(self._size("num_key_value_heads", layout.kv_heads or heads), heads),
            head_size=self._own(head_dim, width / heads),
            norm_eps=self._number("rms_norm_eps", layout.eps, 1e-12, 1),
            **self._rotation(layout),
            qk_norm=layout.qk_norm,
            tied_head=tied and multipliers.embedding == multipliers.head,
            **self._network(layout),
        )
        return PretrainedShape(folder, layout.architecture, model, self._separator(), text, tied, multipliers)

    def _layout(self) -> Layout:
        kind = self._values.get("model_type")
        if not isinstance(kind, str) or kind not in LAYOUTS:
            raise self._unheld("model_type", "one of " + ", ".join(LAYOUTS))
        layout = LAYOUTS[kind]
        named = self._values.get("architectures")
        if named not in (None, [], [layout.architecture.class_name]):
            raise self._unheld("architectures", f'["{layout.architecture.class_name}"]')
        return layout

    def _network(self, layout: Layout) -> dict[str, Any]:
        """The fields of the feed-forward network: experts, or one dense network of exactly `intermediate_size`."""
        hidden = self._size(layout.hidden)
        if not layout.experts:
            # One expert: then the dense network has its width. See `ModelConfig.dense_hidden`.
            return {"dense": "active", "experts": 1, "expert_hidden": hidden, "routing": RoutingConfig(top_k=1)}
        # transformers 5 writes `num_local_experts` for classes that had `num_experts`.
        names = [n for n in ("num_experts", "num_local_experts") if self._values.get(n) is not None]
        if len({self._values[n] for n in names if type(self._values[n]) is int}) > 1:
            raise self._unheld(names[0], f"{names[1]} too")
        experts = self._size(names[0] if names else layout.experts)
        top_k = self._size("num_experts_per_tok", layout.top_k)
        renormalise = True if layout.renormalise is None else self._switch("norm_topk_prob", layout.renormalise)
        if top_k == 1 and renormalise:
            field = "num_experts_per_tok" if layout.renormalise is None else "norm_topk_prob"
            raise self._unheld(field, "such that the gate of a single expert is its probability")
        # Models of this kind are trained without drops. `blocks` drops nothing.
        routing = RoutingConfig(top_k=top_k, dispatch="blocks", renormalise_gates=renormalise)
        fields = {"experts": experts, "expert_hidden": hidden, "routing": routing}
        if layout.shared:
            fields["shared_experts"] = self._multiple(layout.shared, layout.shared_hidden, hidden)
        if layout.gated:
            fields |= {"shared_gate": True, "qkv_bias": self._switch("qkv_bias", True)}
        return fields

    def _multipliers(self, layout: Layout, head_dim: int) -> Multipliers:
        if not layout.multipliers:
            return Multipliers()
        embedding, scores, residual, logits = (self._number(name, 1, 1e-6, 1e6) for name in MULTIPLIERS)
        return Multipliers(embedding, scores * head_dim**0.5, residual, 1 / logits)

    def _context(self) -> int:
        """The longest context: `max_position_embeddings`, or the window of attention if that is shorter."""
        longest, window = self._size("max_position_embeddings"), self._values.get("sliding_window")
        kinds = self._values.get("layer_types")
        known = ("full_attention", "sliding_attention")
        if kinds is not None and not (isinstance(kinds, list) and all(kind in known for kind in kinds)):
            raise self._unheld("layer_types", "a list of full_attention")
        slides = self._switch("use_sliding_window", True) or (kinds is not None and known[1] in kinds)
        if window is None or not slides:
            return longest
        # A window of W positions is no window at all for a context of at most W.
        return min(longest, self._size("sliding_window"))

    def _rotation(self, layout: Layout) -> dict[str, Any]:
        """The base of the rotation, and how it is scaled. transformers 4 has the base in `rope_theta`, 5 in
        `rope_parameters`."""
        theta, scaling = self._values.get("rope_theta"), ""
        for field in ("rope_scaling", "rope_parameters"):
            rope = self._values.get(field)
            if rope is None:
                continue
            if not isinstance(rope, dict):
                raise self._unheld(field, "an object")
            rope = {name: value for name, value in rope.items() if value is not None}
            inner = rope.pop("rope_theta", None)
            if rope.pop("partial_rotary_factor", 1) != 1:
                raise self._unheld(field, "without partial_rotary_factor")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if isinstance(kind, str) and kind in KINDS:
                scaling = self._scaling(field, rope)
            elif kind != "default" or rope.keys() - {"rope_type", "type"}:
                raise self._unheld(field, "of the rope_type default, " + ", ".join(KINDS))
            if inner is not None and theta not in (None, inner):
                raise UserError(
                    f"rope_theta is {_shown(theta)}, and {field}.rope_theta {_shown(inner)}; make them equal"
                )
            theta = theta if inner is None else inner
        self._values = self._values | {"rope_theta": theta}
        return {"rope_theta": self._number("rope_theta", layout.theta, 1, 1e9), "rope_scaling": scaling}

    def _scaling(self, field: str, rope: dict[str, Any]) -> str:
        try:
            return scaling_text(rope, self._size("max_position_embeddings"))
        except (TypeError, ValueError):
            raise self._unheld(field, "an object of numbers") from None

    def _separator(self) -> int | None:
        token = self._values.get("eos_token_id")
        if isinstance(token, list) and token:
            token = token[0]
        if token is not None and not (type(token) is int and 0 <= token < _LARGEST):
            raise self._unheld("eos_token_id", "a token id, or a list of token ids")
        return token

    def _check_fields(self, layout: Layout) -> None:
        own = {"qkv_bias" if layout.gated else "", *(MULTIPLIERS if layout.multipliers else ())}
        for name, allowed in FIXED.items():
            if name not in own and self._values.get(name, allowed[0]) not in allowed:
                raise self._unheld(name, json.dumps(allowed[0]))

    def _size(self, name: str, default: int | None = None) -> int:
        allowed = f"a whole number from 1 to {_LARGEST:,}"
        return self._value(name, default, lambda value: type(value) is int and 1 <= value < _LARGEST, allowed)

    def _multiple(self, name: str, default: int, hidden: int) -> int:
        """The width of the shared experts, as a number of experts of width `hidden`."""
        allowed = f"a multiple of {hidden}, the width of an expert"
        width = self._value(name, default, lambda v: type(v) is int and 0 <= v < _LARGEST and v % hidden == 0, allowed)
        return width // hidden

    def _number(self, name: str, default: float, low: float, high: float) -> float:
        allowed = f"a number from {low:g} to {high:g}"
        return float(self._value(name, default, lambda v: type(v) in (int, float) and low <= v <= high, allowed))

    def _switch(self, name: str, default: bool) -> bool:
        return self._value(name, default, lambda value: type(value) is bool, "true or false")

    def _value(self, name: str, default: Any, ok: Callable[[Any], bool], allowed: str) -> Any:
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if not ok(value):
            raise self._unheld(name, allowed)
        return value

    @staticmethod
    def _own(value: int, usual: float) -> int:
        """0, which stands for the usual value, or another value."""
        return 0 if value == usual else value

    def _unheld(self, name: str, allowed: str) -> UserError:
        return UserError(f"{name} is {_shown(self._values.get(name))}, and must be {allowed} to be imported")


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, default=str))
