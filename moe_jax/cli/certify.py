"""`moe-jax certify`."""

import itertools
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe_jax.cli.command import Command, check_range, check_run_folder, print_json
from moe_jax.config import MeshShape, PresetName
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment
from moe_jax.system.terminal import working

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from moe_jax.certify import Certificate


TRIED = (
    "Tried: one token is changed at a time, and every bit of the earlier outputs is compared. The model computes in "
    "float32 on one device, with random inputs and half of the usual slots, so that choices are dropped. Then the "
    "operations of compiled programs are counted."
)
NOT_TRIED = (
    "Not tried: other inputs, other lengths, other number formats, and gradients. Such a test can find a leak. It "
    "cannot prove that there is none."
)
GROUPS = {
    "causality": "No later token changes an earlier output, in one layer and in the whole model",
    "arithmetic": "Compiled programs multiply what they need, and hardly more",
    "compilations": "No program is compiled twice",
    "mesh": "The training step of several devices",
}
"""The heading of each group of claims, by the first word of their names. Claims on memory stand with arithmetic."""


@dataclass(frozen=True)
class Certify(Command):
    """Test claims about a model: causality while tokens are dropped, arithmetic, memory, and number of compilations.

    The exit status is 1 if a certificate fails. The last line of the output is JSON if it is asked for, or if the
    output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the remaining certificates were not tested"

    preset: PresetName = "nano"
    """The model to test, with its initial parameters."""
    run: str = ""
    """Folder of a run. Its model and its trained parameters are tested instead."""
    batch_size: int = 2
    """Sequences of the training step that is compiled and run. On a mesh, those of each device."""
    mesh: str = ""
    """Test the training step of several devices too, such as data=2,expert=4: what each computes, and what they send
    each other."""
    json: bool = False
    """Print the results as JSON too."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        if self.run:
            check_run_folder(self.run)
        what = f"run {self.run}" if self.run else f"preset {self.preset}, initial parameters"
        MeshShape.parse(self.mesh)
        environment.prepare_environment()
        with working(f"loading {what}"):
            from moe_jax.certify.mesh import certify_mesh
            from moe_jax.certify.model import certify, initial_params
            from moe_jax.parallel.layout import mesh_of
            from moe_jax.runs.load import open_run
            from moe_jax.system.terminal import rich_console

            if self.run:
                opened = open_run(self.run)
                config, params = opened.config, opened.params
            else:
                config = with_vocabulary(preset(self.preset))
                params = initial_params(config)
        remaining = certify(config, params, self.batch_size)
        if (mesh := mesh_of(self.mesh)) is not None:
            on_mesh = certify_mesh(config.on_mesh(self.mesh, self.batch_size, micro_batches=2), params, mesh)
            remaining = itertools.chain(remaining, on_mesh)
        console = rich_console()
        console.print(f"[bold]certificates[/bold] of {what}")
        for line in (TRIED, NOT_TRIED):
            _print_wrapped(console, line)
        results = _tested(console, remaining)
        failed = [c.name for c in results if not c.passed]
        console.print(f"\n{len(results)} claims, {len(failed)} failed")
        print_json(
            {"certificates": len(results), "failed": failed, "results": [c._asdict() for c in results]},
            self.json,
        )
        return 1 if failed else 0


def _tested(console: "Console", remaining: "Iterator[Certificate]") -> "list[Certificate]":
    """All certificates. Each claim is printed when it is tested."""
    results, group = [], ""
    while True:
        with working("testing the next claim" if results else "testing the first claim"):
            certificate = next(remaining, None)
        if certificate is None:
            return results
        results.append(certificate)
        if (of := certificate.name.partition(":")[0]) != group and of != "memory":
            group = of
            console.print(f"\n[bold]{GROUPS[group]}[/bold]\n")
        _print(console, certificate)


def _print(console: "Console", certificate: "Certificate") -> None:
    mark = "[green]pass[/green]" if certificate.passed else "[red]FAIL[/red]"
    console.print(f"{mark}  [bold]{certificate.title or certificate.name}[/bold]")
    _print_wrapped(console, certificate.found, indent=6)
    _print_wrapped(console, f"asked: {certificate.asked}", "dim", indent=6)


def _print_wrapped(console: "Console", text: str, style: str = "", indent: int = 0) -> None:
    """Print a text in lines of at most 80 columns, without spaces at their ends."""
    for line in textwrap.wrap(text, max(min(console.width, 80) - indent, 20)):
        console.print(" " * indent + line, style=style, markup=False)
