"""`moe-jax chat`."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moe_jax.cli.sampling import SamplingArguments, loading
from moe_jax.config import UserError
from moe_jax.runs.catalog import title
from moe_jax.system.terminal import say, stream_text

if TYPE_CHECKING:
    from moe_jax.inference import chat as conversation


def chat(sampling: Annotated[SamplingArguments, tyro.conf.arg(name="")] = SamplingArguments()) -> int:
    """Give a trained model the beginnings of texts, and read how it goes on. The model is loaded and compiled once.

    A line is a beginning; the model continues it, word by word. For a run that is tuned on conversations (`sft`) a line
    is a question; the model answers, and remembers what was said before. A line such as /temp 0.5 changes a setting,
    and /help lists them. Ctrl-C ends the present text, Ctrl-D leaves. If the input is a file or a pipe, each of its
    lines is answered in turn, without colours or other output; a text then stands there with its beginning.
    """
    folder = sampling.checked_run()
    person = sys.stdin.isatty() and sys.stdout.isatty()
    talk = _begin(sampling, folder, person)
    while not talk.ended and (line := _next_line(person)) is not None:
        _answer(talk, line, person)
    return 0


def _begin(sampling: SamplingArguments, folder: Path, person: bool) -> "conversation.Chat":
    with loading(folder):
        from moe_jax.inference.chat import Chat, RoleChat
        from moe_jax.inference.decode import SHORT_PROMPT
        from moe_jax.runs.records import read_summary

        run, generator, settings = sampling.open(folder)
        tuned = run.converses
        generator.compile(SHORT_PROMPT if tuned else 1)  # the roles of a question are tokens too
    if person:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401, gives `input` a history and the arrow keys

        does = "answers: ask it" if tuned else "continues a text: type how it begins"
        say(f"{title(folder)}, step {run.checkpoint.step}, {does}. /help lists the commands, Ctrl-D leaves.")
        if not sampling.run:
            say("With moe-jax come: --run stories and --run nano, which continue a text; --run nano-chat answers.")
        if opening := read_summary(folder).get("opening"):
            say(f"try: {opening}")
    if not tuned:
        return Chat(generator, settings, seed=sampling.seed, limit=sampling.max_tokens)
    context = run.config.model.seq_len
    return RoleChat(generator, settings, seed=sampling.seed, limit=sampling.max_tokens, context=context)


def _next_line(person: bool) -> str | None:
    """The next line that is typed. None at the end, such as Ctrl-D."""
    while True:
        try:
            line = input("\n> " if person else "")
            return None if person and line.strip() in ("exit", "quit") else line
        except EOFError:
            if person:
                print()  # the shell's prompt begins a line of its own
            return None
        except KeyboardInterrupt:
            if not person:
                raise
            print("\n(Ctrl-D or /bye leaves)")


def _answer(talk: "conversation.Chat", line: str, person: bool) -> None:
    """Answer one line: obey it, or continue it."""
    try:
        if line.strip() == "/again":
            line = talk.again()
        elif line.startswith("/") and not line.startswith("//"):
            if answer := talk.command(line):
                say(answer)
            return
        prompt = line.removeprefix("/") if line.startswith("//") else line
        try:
            stream_text(prompt if talk.echoes and not person else "", talk.reply(prompt))
        except KeyboardInterrupt:
            print("(ended by Ctrl-C)")
    except UserError as error:
        say(error)
