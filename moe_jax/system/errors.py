"""Errors that a user can fix. `cli.main` prints each as one line, without a traceback."""

import errno
import os
import re


class ConfigError(ValueError):
    """A wrong value of a flag, or a wrong combination of flags. Exit status 2.

    The text is one line. It names the flag, the value and what is allowed.
    """


class UserError(Exception):
    """A failure that the user can fix. Exit status 1.

    The text is one line. It says what is wrong, with the value, and what to do.
    """


_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
"""What numpy says where a file takes a part of an array."""
_CAUSES = {
    "the disk is full": (errno.ENOSPC, errno.EDQUOT),
    "a file is larger than `ulimit -f` allows": (errno.EFBIG,),
}


def disk_cause(error: Exception) -> str | None:
    """The cause of an error of the file system, or None for another error. Tensorstore and safetensors say it in the
    text of their errors."""
    if _SHORT_WRITE.search(str(error)):
        return "the disk is full"
    for cause, numbers in _CAUSES.items():
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in numbers:
                return cause
        elif any(os.strerror(number) in str(error) for number in numbers):
            return cause
    return (error.strerror or str(error)) if isinstance(error, OSError) else None


_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|out of memory|ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INIT", re.I
)
"""jax's own pool says RESOURCE_EXHAUSTED. What cuBLAS, cuDNN, a kernel or a CUDA graph takes beside the pool fails in
words of its own; cuBLAS without memory for its handle is "not initialized"."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of jax says that the device lacked memory."""
    return _NO_MEMORY.search(str(error)) is not None


def shortened(text: str, most: int = 60) -> str:
    """A text for an error: its beginning, of at most `most` characters. It ends with "..." where it is cut."""
    return text if len(text) <= most else text[: most - 3] + "..."
