"""Compiled programs that the cache folder keeps, for a CPU: a later start neither traces them nor compiles them.

jax keeps compiled programs too, but it finds one by the result of tracing and lowering. Of the processor time from the
command to the first word of the model `stories`, these took a third (`benchmarks/trials.md`, 245).
"""

import hashlib
import importlib.metadata
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled

from moe_jax.system.environment import usable_cores
from moe_jax.system.files import cache_dir, write_atomically
from moe_jax.system.machine import processor, processor_flags

SOURCES = Path(__file__).parents[1]
FOLDERS = ("config", "inference", "model", "system")
"""The folders whose code a program is made of."""


def kept_programs(facts: Sequence[str], make: Callable[[], list[Compiled]]) -> list[Compiled]:
    """The programs that `make` compiles for the first device. Or those that an earlier process has kept for these
    `facts`.

    `facts` say which model and which arguments the programs are for. Programs of another version of the code, of other
    packages, or for another processor are replaced. A file that is damaged counts as missing.
    """
    path = cache_dir() / "programs" / hashlib.sha256("\0".join(facts).encode()).hexdigest()
    surroundings = _surroundings().encode()
    with suppress(OSError, RuntimeError):  # of a disk, or of XLA
        written = path.read_bytes()
        digest, kept = written[:32], written[32:]
        if digest == hashlib.sha256(surroundings + kept).digest():
            return [_loaded(*program) for program in pickle.loads(kept)]
    with _without_cache():
        programs = make()
    with suppress(OSError, ValueError, NotImplementedError):  # of a disk, or of a program that cannot be kept
        kept = pickle.dumps([_written(program) for program in programs])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(surroundings + kept).digest() + kept)
    return programs


def _written(program: Compiled) -> tuple[bytes, Any, Any]:
    """The program, its arguments and its results. A number stands in place of each array."""
    executable, *trees = serialize(program)
    return executable, *(tree.unflatten(range(tree.num_leaves)) for tree in trees)


def _loaded(executable: bytes, *trees: Any) -> Compiled:
    return deserialize_and_load(executable, *map(jax.tree.structure, trees), execution_devices=jax.devices()[:1])


@contextmanager
def _without_cache() -> Iterator[None]:
    """Compile without jax's own cache: a program that came from there lacks functions when it is written again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks the setting only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _surroundings() -> str:
    """What a program depends on besides its model: code, packages, settings of jax and of XLA, and the processor."""
    code = hashlib.sha256()
    for file in sorted(path for folder in FOLDERS for path in (SOURCES / folder).rglob("*.py")):
        code.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    set_here = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))}
    settings = sorted(f"{name}={value}" for name, value in set_here.items() if "CACHE" not in name)
    return repr([code.hexdigest(), versions, settings, processor(), processor_flags(), usable_cores()])
