"""`moe-jax inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_jax.cli.checks import check_out_file
from moe_jax.cli.command import Command, check_run_folder
from moe_jax.config import ConfigError
from moe_jax.system import environment
from moe_jax.system.terminal import say, working


@dataclass(frozen=True)
class Inspect(Command):
    """Write the routing report: one HTML file that shows where every token of a text went."""

    interrupted: ClassVar[str] = "the page was not written"

    run: str
    """Folder of a run."""
    text: str = ""
    """The text to route. Empty: the beginning of the run's validation text."""
    file: str = ""
    """A file that holds the text, in place of --text."""
    out: str = ""
    """The page to write. Empty: RUN/report/routing.html, or routing-of-a-text.html beside it with --text or --file."""
    json: str = ""
    """Write the data behind the page to this file as well."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        text = self._text()
        environment.prepare_environment()
        with working(f"routing a text through {self.run}"):
            from moe_jax.inspection.report import report_path, write_report

            folder = Path(self.run)
            path = Path(self.out) if self.out else report_path(folder, of_a_text=bool(text))
            write_report(folder, path, text=text, step=self.step, json_out=Path(self.json) if self.json else None)
        say(f"{path}: the routing report; open it in a browser")
        return 0

    def _text(self) -> str:
        for flag, value in (("--out", self.out), ("--json", self.json)):
            if value:
                check_out_file(flag, value)
        if not self.file:
            return self.text
        if self.text:
            raise ConfigError(f"--file {self.file}: --text is given too; give one of them")
        try:
            text = Path(self.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {self.file}: must be a text in UTF-8 that can be read ({error})") from None
        if not text:
            raise ConfigError(f"--file {self.file}: is empty; give a text")
        return text
