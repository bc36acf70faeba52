"""What the server says about its model: /v1/models, and the bounds that follow from the model."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_jax.config import UserError
from moe_jax.inference.routing_pass import check_routed
from moe_jax.runs.load import LoadedRun
from moe_jax.runs.records import read_summary
from moe_jax.serving import limits


@dataclass(frozen=True)
class ModelCard:
    """A run, as its clients see it."""

    run: LoadedRun
    name: str
    slots: int
    folder: Path
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def context(self) -> int:
        """T."""
        return self.run.config.model.seq_len

    @property
    def tuned(self) -> bool:
        """Whether the run is tuned on conversations."""
        return self.run.config.data.format == "chat"

    @property
    def expert_layers(self) -> list[int]:
        """The layers whose experts can be reported."""
        try:
            check_routed(self.run.config.model)
        except UserError:
            return []
        return list(range(self.run.config.model.layers))

    def to_dict(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        model = self.run.config.model
        summary = read_summary(self.folder)
        opening = summary.get("opening")  # earlier runs have only one
        about = {
            "layers": model.layers,
            "expert_layers": self.expert_layers,
            "experts": model.experts if self.expert_layers else 0,
            "experts_per_token": model.routing.top_k if self.expert_layers else 0,
            "context": self.context,
            "vocab_size": self.run.tokenizer.vocab_size,
            "chat": self.tuned,
            "prompts": summary.get("openings") or ([opening] if opening else []),
            "val_bits_per_byte": summary.get("val_bits_per_byte"),
            "slots": self.slots,
            "max_tokens": limits.MAX_TOKENS,
        }
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "moe-jax", "moe_jax": about}
