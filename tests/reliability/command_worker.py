"""Runs command lines one after the other in one process, so that programs are compiled once.

The commands run through `moe_jax.cli.main`. Two things are made cheaper, and nothing that they read or check: programs
of equal settings are built once (`keep_programs`), and pictures are drawn small.

A line of stdin is a JSON object: `argv`, which begins with `train.py` or with a command of `moe-jax`. The answer is a
line of JSON: the status, what was printed, the exception that escaped, seconds of processor time, and bytes of memory.
"""

import functools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from moe_jax.system import environment

_CLEAR_PEAK = "5"
"""Written into /proc/self/clear_refs, it sets the peak of the resident memory to the present value."""


RUNNING = [""]
"""The command that runs now."""


def memory(name: str) -> int | None:
    """A value of /proc/self/status, such as VmRSS, in bytes. None where the system has no such file."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None


def clear_peak() -> bool:
    """Whether the system could forget the peak of the resident memory."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
        return True
    return False


@contextmanager
def captured(out: IO[bytes], err: IO[bytes]) -> Iterator[None]:
    """Send the descriptors 1 and 2 into files: the C++ libraries and other threads write there too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def keep_programs() -> None:
    """Let commands of the same settings share their jitted functions. A new one would be traced and lowered anew."""
    from moe_jax.inference import generate, routing_pass
    from moe_jax.inspection import ablation, corpus_routing, report, trace
    from moe_jax.training import evaluate, programs, routing_snapshot, session, step_logger

    evaluate.make_evaluation_step = programs.make_evaluation_step = functools.cache(evaluate.make_evaluation_step)
    generate.Decoder = programs.Decoder = functools.cache(programs.Decoder)
    decision = functools.cache(routing_pass.make_decision_step)
    corpus_routing.make_decision_step = routing_snapshot.make_decision_step = decision
    trace.make_trace_step = functools.cache(routing_pass.make_trace_step)
    ablation.make_switched_losses = functools.cache(ablation.make_switched_losses)
    ablation.SwitchedWriter = functools.cache(ablation.SwitchedWriter)
    steps: dict[Any, Any] = {}
    make_step, compiled_layer = programs.make_step, report.compiled_layer

    def kept_step(graphdef: Any, optimizer: Any, config: Any, scaling: bool, loss: Any) -> Any:
        key = (graphdef, config, scaling, loss.keywords["implementation"])  # the optimizer is a function of the config
        if key not in steps:
            steps[key] = make_step(graphdef, optimizer, config, scaling, loss=loss)
        return steps[key]

    layers: dict[Any, Any] = {}

    def kept_layer(opened: Any) -> Any:
        key = (opened.config.model, opened.policy)
        if key not in layers:
            layers[key] = compiled_layer(opened)
        return layers[key]

    programs.make_step, report.compiled_layer = kept_step, kept_layer
    session.SAMPLE_TOKENS = 24
    step_logger.matmul_rate = lambda _: 1e9


def draw_small() -> None:
    """Draw each picture of `plot` once, at a low resolution and without a layout that tries several.

    Training draws the same pictures at its end, so they are not drawn again there.
    """
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    def small(self: Any, file: Any, *, format: str, **_: Any) -> None:
        if format == "svg" or RUNNING[0] != "plot":
            file.write(b"picture")
        else:
            self.set_layout_engine("none")
            savefig(self, file, format=format, dpi=10)

    Figure.savefig = small  # type: ignore[method-assign]


def run(argv: list[str]) -> dict[str, Any]:
    from moe_jax.cli import main
    from moe_jax.cli.train import Train

    program: Callable[[Any], int | None] = main.run_command
    if argv[0] == "train.py":
        program, argv = (lambda rest: main.run_as(Train, rest, "train.py")), argv[1:]
    RUNNING[0] = argv[0]
    status, escaped = None, ""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        cleared, before, begin = clear_peak(), memory("VmRSS"), time.process_time()
        with captured(out, err):
            try:
                status = main.main(program, argv)
            except BaseException:
                escaped = traceback.format_exc()
        seconds, peak = time.process_time() - begin, memory("VmHWM")
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    grown = peak - before if cleared and peak is not None and before is not None else None
    return {"status": status, "out": texts[0], "err": texts[1], "escaped": escaped, "seconds": seconds, "grown": grown}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    environment.prepare_environment()
    keep_programs()
    draw_small()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
