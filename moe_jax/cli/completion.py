"""`moe-jax completion`."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.cli.arguments import POSITIONAL
from moe_jax.cli.command import Command

Shell = Literal["bash", "zsh", "tcsh"]


@dataclass(frozen=True)
class Completion(Command):
    """Print a script that completes the commands and flags of `moe-jax` in a shell.

    For bash. The first line is for this shell only, the second for all later ones:

        source <(moe-jax completion bash)
        moe-jax completion bash > ~/.local/share/bash-completion/completions/moe-jax
    """

    shell: Shell = field(metadata=POSITIONAL)
    """The shell that reads the script."""

    def execute(self) -> int:
        import shtab

        from moe_jax.cli.help import whole_parser

        print(shtab.complete(whole_parser("moe-jax"), self.shell))
        return 0
