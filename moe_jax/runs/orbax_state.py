"""What orbax does for a checkpoint: the state of training, the atomic commit of its folder, and the retention.

Orbax stores each array as zarr in one OCDBT database, without compression: trained weights hardly compress. Its
CheckpointManager fills a temporary folder and renames it. `CheckpointHandler` adds weights.safetensors and the manifest
to that folder before the rename, so all files of a checkpoint are there, or none.

This module imports orbax, which takes as long as a sixth of a start. So it is imported by the first save, or when a
training goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from moe_jax.runs import manifest
from moe_jax.runs.arrays import WEIGHTS, Shapes, is_weight, sharding_of, unreadable, write_weights

ARRAYS = "arrays"
NEWEST = 2
"""Checkpoints that are kept beside the best one, so that a run survives a damaged checkpoint."""


class CheckpointHandler(ocp.PyTreeCheckpointHandler):
    """Writes a checkpoint: the state of training into the folder that orbax gives it, the weights and the manifest
    beside that folder."""

    def __init__(self) -> None:
        super().__init__(use_compression=False, multiprocessing_options=_processes())
        self._document: Mapping[str, Any] = {}

    async def async_save(self, directory: Any, args: "SaveArgs") -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write all arrays. All processes call this; process 0 writes the weights."""
        self._document = args.document
        write_weights(Path(directory).parent, args.leaves)
        state = {name: leaf for name, leaf in args.leaves.items() if not is_weight(name)}
        return await super().async_save(directory, args=ocp.args.PyTreeSave(state))

    def finalize(self, directory: Any) -> None:
        """Complete the arrays of all processes, and write the manifest. Process 0 alone calls this, before the rename
        of the whole folder. Until then the folder `arrays` has a temporary name."""
        super().finalize(directory)
        arrays, folder = Path(directory), Path(directory).parent
        files = manifest.describe_files(folder, [folder / WEIGHTS])
        state = manifest.describe_files(arrays, (path for path in arrays.rglob("*") if path.is_file()))
        files |= {f"{ARRAYS}/{name}": described for name, described in state.items()}
        manifest.write(folder, {**self._document, "files": files})


@ocp.args.register_with_handler(CheckpointHandler, for_save=True, for_restore=True)
@dataclass
class SaveArgs(ocp.args.CheckpointArgs):
    """What is saved: every array by its name, and the manifest without `files`."""

    leaves: Mapping[str, Any]
    document: Mapping[str, Any]


class CheckpointManager(ocp.CheckpointManager):
    """Orbax's manager, without jax's preemption service: `parallel.processes.stop_reason` says when to stop."""

    def reached_preemption(self, step: int) -> bool:
        """Always False: nobody asks to save this step in a hurry."""
        return False


def save_step(folder: Path, step: int, leaves: Mapping[str, Any], document: Mapping[str, Any], kept: list[int]) -> None:
    """Save a checkpoint, and remove those that are neither of the newest two nor of the steps `kept`. What an
    interrupted save has left is removed first. Of several processes, all call this."""
    options = ocp.CheckpointManagerOptions(
        step_name_format=ocp.path.step.standard_name_format(step_prefix="step", step_format_fixed_length=8),
        preservation_policy=AnyPreservationPolicy([LatestN(NEWEST), CustomSteps(kept)]),
        create=False,  # which orbax does not do for several processes
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
        save_root_metadata=False,
        lightweight_initialize=True,  # orbax's own file about an earlier step may be damaged
        multiprocessing_options=_processes(),
    )
    with CheckpointManager(folder.resolve(), options=options, item_handlers={ARRAYS: CheckpointHandler()}) as manager:
        manager.save(step, args=ocp.args.Composite(**{ARRAYS: SaveArgs(leaves, document)}))


def _processes() -> ocp.options.MultiprocessingOptions:
    """Orbax waits by a program on the devices unless it is told which processes there are."""
    return ocp.options.MultiprocessingOptions(active_processes={*range(jax.process_count())})


def state_shapes(arrays: Path) -> Shapes:
    """The arrays that orbax has written into a folder. Raises CheckpointCorrupted if it cannot read it."""
    try:
        stored = ocp.PyTreeCheckpointHandler().metadata(arrays.resolve()).tree  # pyright: ignore[reportArgumentType]
    except (ValueError, KeyError) as error:
        raise unreadable("arrays", error) from error
    return {name: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype)) for name, x in stored.items()}


def read_state(arrays: Path, wanted: Shapes) -> dict[str, jax.Array]:
    """Read some arrays of a folder, each to the devices of its sharding. Raises CheckpointCorrupted if orbax cannot."""
    item = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)) for name, x in wanted.items()}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    try:
        return ocp.PyTreeCheckpointHandler().restore(arrays.resolve(), args=args)  # pyright: ignore[reportArgumentType]
    except (ValueError, KeyError) as error:
        raise unreadable("arrays", error) from error
