"""`moe-jax quantize`."""

import shlex
from pathlib import Path
from typing import Literal

from moe_jax.cli.options import Json, RunName, StepNumber, check_out_folder, checked_run, print_json, starting
from moe_jax.runs.catalog import title
from moe_jax.system.terminal import say


def quantize(
    to: Literal["int8", "int4"], run: RunName = "", step: StepNumber = None, out: str = "", json: Json = False
) -> int:
    """Write a trained run with 8 or 4 bits a weight: smaller, and faster to decode.

    The validation text is scored before and after. The new run opens like any other, but it cannot be trained or
    exported. Activations stay as they are.

    The last line of the output is JSON if it is asked for, or if the output is a file or a pipe.

    Args:
        to: int8: one scale for each output of a matrix. int4: one scale for each output and 32 inputs.
        out: The folder of the new run. Empty: the name of the run, with -int8 or -int4.
    """
    folder = checked_run(run, step)
    target = Path(out) if out else folder.with_name(f"{folder.resolve().name}-{to}")
    check_out_folder("--out", target, new=True)
    with starting(f"loading {title(folder)}"):
        from moe_jax.training.quantize import quantize_run
    made = quantize_run(folder, to, target, step)
    say(f"{made.checkpoint}: {to}")
    say(f"weights: {made.bytes_before / 1e6:,.2f} MB before, {made.bytes_after / 1e6:,.2f} MB after")
    result = {"bytes_before": made.bytes_before, "bytes_after": made.bytes_after}
    if made.before is None or made.after is None:
        say(f"not scored: {made.not_scored}")
    else:
        more = made.after.loss / made.before.loss - 1
        say(f"bits per byte: {made.before.bits_per_byte:.4f} before, {made.after.bits_per_byte:.4f} after")
        say(f"loss: {made.before.loss:.4f} before, {made.after.loss:.4f} after ({more:+.2%})")
        for name, scored in (("before", made.before), ("after", made.after)):
            result |= {f"val_loss_{name}": scored.loss, f"val_bits_per_byte_{name}": scored.bits_per_byte}
    print(f"next: uv run moe-jax chat --run {shlex.quote(str(target))}")
    print_json(result, json)
    return 0
