"""`moe-jax inspect`."""

from pathlib import Path

from moe_jax.cli.options import RunName, StepNumber, check_out_file, checked_run, starting
from moe_jax.config import ConfigError
from moe_jax.runs.catalog import is_shipped, title
from moe_jax.system.files import json_text, write_output
from moe_jax.system.terminal import say


def inspect(
    run: RunName = "",
    step: StepNumber = None,
    text: str = "",
    file: str = "",
    out: str = "",
    json: str = "",
    trace: str = "",
) -> int:
    """Write the routing report: one HTML file that shows where every token of a text went.

    With --trace, write instead every decision on a whole text of any length, for programs of your own, and say what was
    counted.

    Args:
        text: The text to route. Empty: the beginning of the run's validation text.
        file: A file that holds the text, in place of --text. With --trace also a folder, whose files are kinds of text.
        out: The page to write. Empty: RUN/report/routing.html, or routing-of-a-text.html beside it with --text or
            --file; of a model that comes with moe-jax, routing-NAME.html here.
        json: Write the data behind the page to this file as well. With --trace: the counts.
        trace: Write every decision to this .npz file: arrays `token` [N], `expert` and `gate` [N, layers, K]. No page
            is written.
    """
    folder = checked_run(run, step)
    if trace and out:
        raise ConfigError(f"--out {out}: --trace {trace} writes no page; leave one of them out")
    if trace and not trace.endswith(".npz"):
        raise ConfigError(f"--trace {trace}: must end in .npz; numpy.load reads it")
    for flag, value in (("--trace", trace), ("--out", out), ("--json", json)):
        if value:
            check_out_file(flag, value)
    texts = _texts(text, file, folders=bool(trace))
    if trace:
        return _trace(folder, step, texts, Path(trace), json)
    with starting(f"routing a text through {title(folder)}"):
        from moe_jax.inspection.report import report_path, write_report
    given = texts[0][1] if texts else ""
    shipped = is_shipped(folder)
    own = Path(f"routing-{folder.name}.html") if shipped else report_path(folder, bool(given))
    path = Path(out) if out else own
    write_report(folder, path, text=given, step=step, json_out=Path(json) if json else None)
    say(f"{path}: the routing report; open it in a browser")
    return 0


def _texts(text: str, file: str, folders: bool) -> list[tuple[str, str]]:
    """(kind, text) of the texts that are given."""
    if not file:
        return [("text", text)] if text else []
    if text:
        raise ConfigError(f"--file {file}: --text is given too; give one of them")
    files = [Path(file)]
    if folders and files[0].is_dir():
        files = sorted(p for p in files[0].iterdir() if p.is_file() and not p.name.startswith("."))
    try:
        texts = [(path.stem, path.read_text(encoding="utf-8")) for path in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file}: must be a text in UTF-8 that can be read ({error})") from None
    if not any(text for _, text in texts):
        raise ConfigError(f"--file {file}: is empty; give a text")
    return texts


def _trace(folder: Path, step: int | None, named: list[tuple[str, str]], path: Path, json: str) -> int:
    with starting(f"loading {title(folder)}"):
        from moe_jax.inspection.decisions import write_decisions
        from moe_jax.runs.load import open_run

        run = open_run(folder, step)
        texts = [(kind, [run.tokenizer.separator_id, *run.tokenizer.encode(text)]) for kind, text in named]
        texts = texts or [("validation", run.validation_text(progress=False)[0].valid.tokens.tolist())]
    counts = write_decisions(run, texts, path)
    say(f"{path}: {counts.tokens:,} tokens", *counts.describe())
    if json:
        write_output(Path(json), json_text(counts.to_json()) + "\n")
    return 0
