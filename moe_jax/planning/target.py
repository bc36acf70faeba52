"""Descriptions of NVIDIA GPUs (`targets/*.txtpb`), as XLA's compiler reads them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import ConfigError, UserError
from moe_jax.system.environment import MIB

GPU_TARGETS = Path(__file__).parent / "targets"
"""Folder with one description file for each GPU."""
DEFAULT_GPU = "rtx3050-4gb"
CARDS_PER_HOST = 8
"""Cards of one machine, in plans for more of them than this."""
_LONGEST_DESCRIPTION = 1 << 20
"""Bytes. The descriptions that come with the package have about 2,000."""
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

    def _field(self, name: str) -> str:
        """The number or the quoted text of a field. Raises UserError if the description has no such field."""
        found = re.search(rf'\b{name}: *(?:"([^"]*)"|([0-9.]+))', self.text)
        if found is None:
            raise UserError(f"target {self.name}: its description has no {name}")
        return found[1] or found[2]

    def number(self, name: str) -> float:
        """The number in a field, such as `core_count`. Raises UserError if the description has no such field."""
        return float(self._field(name))

    @property
    def memory(self) -> int:
        """Bytes that the card reports."""
        return int(self._field("device_memory_size"))

    @property
    def compute_capability(self) -> str:
        """Such as "8.6". Raises UserError if the description has none.

        Other blocks have fields `major` and `minor` too, such as the version of cuDNN. A field that is 0 is left out
        of the text.
        """
        block = re.search(r"\bcuda_compute_capability *\{([^{}]*)\}", self.text)
        major, minor = (re.search(rf"\b{name}: *([0-9]+)", block[1] if block else "") for name in ("major", "minor"))
        if major is None:
            raise UserError(
                f"--gpu {self.name}: its description has no cuda_compute_capability; the files in {GPU_TARGETS} show "
                "how a GPU is described"
            )
        return f"{major[1]}.{minor[1] if minor else 0}"

    @property
    def device_kind(self) -> str:
        return self._field("device_description_str")

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


def check_gpu(name: str) -> None:
    """Raise ConfigError unless this is the name of a described GPU, or a file that describes one."""
    names = sorted(path.stem for path in GPU_TARGETS.glob("*.txtpb"))
    if name in names:
        return
    if not Path(name).is_file():
        if os.sep in name or Path(name).suffix:
            raise ConfigError(f"--gpu {name}: there is no such file; the names are {', '.join(names)}")
        raise ConfigError(f"--gpu {name}: must be one of {', '.join(names)}, or a file that describes a GPU")
    with open(name, "rb") as file:
        start = file.read(_LONGEST_DESCRIPTION + 1)
    if len(start) > _LONGEST_DESCRIPTION or b"\0" in start or b"device_memory_size" not in start:
        raise ConfigError(f"--gpu {name}: does not describe a GPU; the files in {GPU_TARGETS} show how one does")


def load_target(name: str) -> Target:
    """The target of this name that comes with the package, or else the target in the file of this path.

    Raises UserError if the file is not UTF-8, and OSError if it is missing or cannot be read.
    """
    ours = GPU_TARGETS / f"{name}.txtpb"
    path = ours if ours.is_file() else Path(name)
    try:
        return Target(path.stem, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"--gpu {name}: is not UTF-8; the files in {GPU_TARGETS} show how a GPU is described") from None
