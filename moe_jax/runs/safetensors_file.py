"""Files of safetensors, written. Without jax, so that an export starts at once."""

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a new file of tensors, with the permissions that the umask gives to any new file.

    Raises FileExistsError if there is a file of this name.
    """
    with path.open("xb") as file:
        usual = os.fstat(file.fileno()).st_mode & 0o777
    save_file(tensors, path, metadata)
    path.chmod(usual)  # safetensors makes a file that only its owner may read
