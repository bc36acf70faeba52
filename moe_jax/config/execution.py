"""How a model is computed: precision, memory, determinism. A resumed run may change every field."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.config.flags import check_choices

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ExecutionConfig:
    """How a model is computed. The function that it computes stays the same, up to rounding."""

    compute_dtype: ComputeDtype = "auto"
    """Precision of activations and matrix products. `auto` chooses from the device and says why."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
    deterministic: bool = False
    """On a GPU, use only programs that give the same bits each time, at some cost in speed. A CPU always does."""
    mesh: str = ""
    """Devices that train together, as AXIS=SIZE,...: `data` divides the batch, `fsdp` also the matrices, `expert` also
    the experts. The sizes multiply to the number of devices. Without it, one device."""

    def __post_init__(self) -> None:
        check_choices(self, "execution")
