"""The mesh of devices of a run, as `--mesh data=2,expert=4` names it. Standard library only."""

from typing import NamedTuple

from moe_jax.config.flags import check
from moe_jax.config.model import ModelConfig
from moe_jax.config.train import TrainConfig
from moe_jax.system.errors import FieldError

_ALLOWED = "axes data, fsdp and expert, each at most once with a size of 1 to 65,536, such as data=2,expert=4"


class MeshShape(NamedTuple):
    """How many devices lie along each axis of a mesh. The sequences of a batch are divided over all axes."""

    data: int = 1
    """Devices along this axis hold the same parameters."""
    fsdp: int = 1
    """Devices along this axis each hold a part of every matrix, cut along the model width D."""
    expert: int = 1
    """Devices along this axis each hold some of the experts. Tokens travel to them."""

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.expert

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """The shape that a text such as "data=2,expert=4" names. An empty text is one device.

        Raises ConfigError if the text is not of this form.
        """
        sizes: dict[str, int] = {}
        for part in text.split(",") if text else ():
            axis, _, size = part.partition("=")
            known = axis in cls._fields and axis not in sizes
            usual = size.isascii() and size.isdigit() and len(size) <= 5 and 1 <= int(size) <= 2**16
            check(known and usual, "execution", "mesh", text, _ALLOWED)
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = [f"{axis} {size}" for axis, size in zip(self._fields, self, strict=True) if size > 1]
        return " x ".join(sizes) or "one device"


def check_mesh(text: str, model: ModelConfig, train: TrainConfig) -> None:
    """Raise ConfigError unless the model and the batch can be divided over the mesh."""
    shape = MeshShape.parse(text)

    def require(ok: bool, allowed: str) -> None:
        check(ok, "execution", "mesh", text, allowed)

    batch, devices = train.batch_size, shape.devices
    if batch % devices:
        problem = f"{devices} devices; --batch-size {batch} is not a multiple of {devices}"
        raise FieldError("execution", "mesh", f"--mesh {text}", problem)
    require(model.width % shape.fsdp == 0, f"an fsdp axis that divides --model.width {model.width} evenly")
    if shape.expert > 1:
        require(model.dense == "none", f"without an expert axis: --model.dense {model.dense} has no experts to divide")
        require(model.experts % shape.expert == 0, f"an expert axis that divides --experts {model.experts} evenly")
