"""`moe-jax verify-resume`."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.cli.memory import check_memory
from moe_jax.cli.settings import RunCommand
from moe_jax.system import environment


@dataclass(frozen=True)
class VerifyResume(RunCommand):
    """Show that a killed and resumed run loses nothing on this machine.

    A short run with your settings is killed and resumed. Every bit of it is compared with a run that was never stopped.
    Both runs are in a temporary folder. The exit status is 1 if a bit differs.
    """

    interrupted: ClassVar[str] = "nothing was shown; its temporary runs are removed"

    def execute(self) -> int:
        config = self.settings.config
        check_memory(config)
        environment.prepare_environment(config.execution.deterministic)
        from moe_jax.runs.verify_resume import verify_resume

        return verify_resume(config)
