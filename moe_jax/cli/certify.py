"""`moe-jax certify`."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe_jax.cli.command import Command, check_range, check_run_folder
from moe_jax.cli.result import print_json
from moe_jax.config import MeshShape, PresetName
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment
from moe_jax.system.console import working

if TYPE_CHECKING:
    from moe_jax.certificates.certificate import Certificate
    from moe_jax.system.rich_console import Console


@dataclass(frozen=True)
class Certify(Command):
    """Test claims about a model: causality while tokens are dropped, arithmetic, memory, and number of compilations.

    The rules of priority that let the future in must be caught leaking, or the test would be blind. The exit status is
    1 if a certificate fails. The last line of the output is JSON if it is asked for, or if the output is a file or a
    pipe.
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
            from moe_jax.certificates.certify import certify, initial_params
            from moe_jax.certificates.on_mesh import certify_mesh
            from moe_jax.parallel.mesh import mesh_of
            from moe_jax.runs.load import open_run
            from moe_jax.system.rich_console import Console

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
        console, found = Console(), []
        console.print(f"[bold]certificates[/bold] of {what}\n")
        while True:
            with working("testing the next claim" if found else "testing the first claim"):
                certificate = next(remaining, None)
            if certificate is None:
                break
            found.append(certificate)
            if not certificate.must_leak:
                _print(console, certificate)
        leaks = [c for c in found if c.must_leak]
        if leaks:
            console.print("\n[bold]known leaks[/bold] that the tests above must catch, or they would be blind\n")
        for certificate in leaks:
            _print(console, certificate)
        failed = [c.name for c in found if not c.passed]
        console.print(f"\n{len(found) - len(leaks)} claims and {len(leaks)} known leaks, {len(failed)} failed")
        print_json(
            {"certificates": len(found), "failed": failed, "results": [c._asdict() for c in found]},
            self.json,
        )
        return 1 if failed else 0


def _print(console: "Console", certificate: "Certificate") -> None:
    from rich.padding import Padding
    from rich.text import Text

    passed = "caught" if certificate.must_leak else "pass"
    mark = f"[green]{passed:<6}[/green]" if certificate.passed else "[red]FAIL  [/red]"
    console.print(f"{mark}  [bold]{certificate.name}[/bold]")
    for text, style in ((certificate.found, ""), (f"asked: {certificate.asked}", "dim")):
        console.print(Padding(Text(text, style), (0, 0, 0, 8)))
