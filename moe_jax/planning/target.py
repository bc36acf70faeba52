"""Descriptions of NVIDIA GPUs (`targets/*.txtpb`), as XLA's compiler reads them."""

import re
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import ConfigError
from moe_jax.system.environment import MIB

GPU_TARGETS = Path(__file__).parent / "targets"
"""Folder with one description file for each GPU."""
DEFAULT_GPU = "rtx3050-4gb"
CARDS_PER_HOST = 8
"""Cards of one machine, in plans for more of them than this."""
_LONGEST_DESCRIPTION = 1 << 20
"""Bytes. The descriptions that come with the package have about 2,000."""
_EXAMPLES = f"the files in {GPU_TARGETS} show how a GPU is described"
PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes at start by default (XLA_PYTHON_CLIENT_MEM_FRACTION). A program gets no more.
`system.environment` may choose another share for a small card; plans do not count on it."""
MARGIN = 0.85
"""Share of JAX's memory that a plan may use. The rest is for memory that XLA's buffer plan leaves out."""


@dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler sees it."""

    name: str
    text: str
    """Text form of stream_executor.GpuTargetConfigProto."""

    def _field(self, name: str, form: str) -> str:
        """The content of a field that has this form. Raises ConfigError if the description has none."""
        value = re.search(rf"\b{name}: *{form}(?![^\s}}])", self.text)
        if value is None:
            raise ConfigError(f"--gpu {self.name}: its description has no {name}, or a wrong one; {_EXAMPLES}")
        return value[1]

    def number(self, name: str) -> float:
        """The number in a field, such as `core_count`. Raises ConfigError if the description has no such field."""
        return float(self._field(name, r"([0-9]+(?:\.[0-9]+)?)"))

    @property
    def memory(self) -> int:
        """Bytes that the card reports."""
        return int(self._field("device_memory_size", r"([0-9]{1,18})"))

    @property
    def compute_capability(self) -> str:
        """Such as "8.6". Raises ConfigError if the description has none.

        Other blocks have fields `major` and `minor` too, such as the version of cuDNN. A field that is 0 is left out
        of the text.
        """
        block = re.search(r"\bcuda_compute_capability *\{([^{}]*)\}", self.text)
        major, minor = (re.search(rf"\b{name}: *([0-9]+)", block[1] if block else "") for name in ("major", "minor"))
        if major is None:
            raise ConfigError(f"--gpu {self.name}: its description has no cuda_compute_capability; {_EXAMPLES}")
        return f"{major[1]}.{minor[1] if minor else 0}"

    @property
    def device_kind(self) -> str:
        return self._field("device_description_str", '"([^"]*)"')

    @property
    def platform(self) -> str:
        """The same as `jax.Device.platform`, so that `hardware.Card.of` accepts a target in place of a device."""
        return "gpu"

    @property
    def budget(self) -> float:
        """MiB that a plan may use: 85 % of JAX's share, which is 75 % of the card's memory.

        The other 15 % are for memory outside XLA's buffers, which is not measured here: loaded kernels, handles and
        workspaces of libraries, scratch memory of autotuning, and fragmentation. The CUDA context and a display use the
        25 % of the card that JAX does not take.
        """
        return MARGIN * PREALLOCATED * self.memory / MIB


def described_gpus() -> list[str]:
    """The names of the targets that come with the package."""
    return sorted(path.stem for path in GPU_TARGETS.glob("*.txtpb"))


def load_target(name: str) -> Target:
    """The target of this name that comes with the package, or else the target in the file of this path.

    Raises ConfigError if there is no such file, or it does not describe a GPU.
    """
    ours = GPU_TARGETS / f"{name}.txtpb"
    path = ours if ours.is_file() else Path(name)
    if not path.is_file():
        raise ConfigError(f"--gpu {name}: must be one of {', '.join(described_gpus())}, or a file that describes a GPU")
    with path.open("rb") as file:
        start = file.read(_LONGEST_DESCRIPTION + 1)
    target = Target(path.stem, start.decode(errors="replace"))
    if len(start) > _LONGEST_DESCRIPTION or "device_memory_size" not in target.text:
        raise ConfigError(f"--gpu {name}: does not describe a GPU; {_EXAMPLES}")
    _ = target.memory, target.compute_capability, target.device_kind  # each raises ConfigError if it is wrong
    return target
