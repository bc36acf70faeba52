"""The folder of a public model: its files, and its download by the name that it has on the Hugging Face hub.

The hub's library downloads into its own cache, where other programs find the model too. A download that breaks off goes
on at the next call.
"""

import errno
import os
import re
from pathlib import Path
from typing import BinaryIO

from moe_jax.config import UserError

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


def read_file(folder: Path, name: str, limit: int | None = None) -> bytes:
    """A plain file of a folder. The caches of Hugging Face hold links to plain files, so a link is followed.

    Raises OSError, also for a file that is not plain (a device, a pipe), or has more than `limit` bytes.
    """
    with open_file(folder, name, limit) as file:
        return file.read()


def open_file(folder: Path, name: str, limit: int | None = None) -> BinaryIO:
    """A plain file of a folder, open for reading. Raises the errors of `read_file`."""
    path = Path(os.path.realpath(folder / name))
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(errno.EINVAL, "is no plain file; remove it", str(path))
    if limit is not None and size > limit:
        problem = f"has {size:,} bytes, and at most {limit:,} are read; put the right file there"
        raise OSError(errno.EFBIG, problem, str(path))
    return path.open("rb")
