"""`moe-jax certify`."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.cli.command import Command, check_range, check_run_folder
from moe_jax.config import PresetName
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.system import environment
from moe_jax.system.json_text import json_text


@dataclass(frozen=True)
class Certify(Command):
    """Test claims about a model: causality while tokens are dropped, arithmetic, memory, and number of compilations.

    The last line of the output is JSON. The exit status is 1 if a certificate fails.
    """

    interrupted: ClassVar[str] = "the remaining certificates were not tested"

    preset: PresetName = "nano"
    """The model to test, with its initial parameters."""
    run: str = ""
    """Folder of a run. Its model and its trained parameters are tested instead."""
    batch_size: int = 2
    """Sequences of the training step that is compiled and run."""

    def execute(self) -> int:
        check_range("--batch-size", self.batch_size, 1, 4096)
        if self.run:
            check_run_folder(self.run)
        environment.prepare_environment()
        from moe_jax.certificates.certify import certify, initial_params
        from moe_jax.runs.load import open_run
        from moe_jax.system.rich_console import Console

        if self.run:
            opened = open_run(self.run)
            config, params = opened.config, opened.params
        else:
            config = with_vocabulary(preset(self.preset))
            params = initial_params(config)
        console = Console(soft_wrap=True)
        what = f"run {self.run}" if self.run else f"preset {self.preset}, initial parameters"
        console.print(f"[bold]certificates[/bold] of {what}\n")
        found = []
        for certificate in certify(config, params, self.batch_size):
            found.append(certificate)
            mark = "[green]pass[/green]" if certificate.passed else "[red]FAIL[/red]"
            console.print(f"{mark}  [bold]{certificate.name}[/bold]")
            console.print(f"      {certificate.found}", markup=False)
            console.print(f"      asked: {certificate.asked}", style="dim", markup=False)
        failed = [c.name for c in found if not c.passed]
        console.print(f"\n{len(found)} certificates, {len(failed)} failed\n")
        print(json_text({"certificates": len(found), "failed": failed, "results": [c._asdict() for c in found]}))
        return 1 if failed else 0
