"""`moe-jax chat`."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe_jax.cli.sampling import SamplingCommand
from moe_jax.config import UserError
from moe_jax.system import environment
from moe_jax.system.terminal import rich_console, say, stream_text, working

if TYPE_CHECKING:
    from moe_jax.inference import chat as conversation

COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green")
COLOURS += ("dark_orange", "bright_blue", "bright_magenta", "bright_cyan", "grey62", "gold3", "plum3", "spring_green3")
"""Colours of the experts, by number. More experts share them."""


@dataclass(frozen=True)
class Chat(SamplingCommand):
    """Give a trained model the beginnings of texts, and read how it goes on. The model is loaded and compiled once.

    A line is a beginning; the model continues it, word by word. For a run that is tuned on conversations (`sft`) a line
    is a question; the model answers, and remembers what was said before. A line such as /temp 0.5 changes a setting,
    and /help lists them. Ctrl-C ends the present text, Ctrl-D leaves. If the input is a file or a pipe, each of its
    lines is answered in turn, without colours and without a word more.
    """

    interrupted: ClassVar[str] = "the conversation is over"

    def execute(self) -> int:
        self.check()
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.inference import chat
            from moe_jax.inference.generate import TextGenerator
            from moe_jax.runs.load import open_run

            run = open_run(self.run, self.step)
            model, tuned = run.config.model, run.config.data.format == "chat"
            generator = TextGenerator(run.writer, run.params, run.tokenizer, model.seq_len)
            generator.compile()
        layers = model.layers if model.dense == "none" else 0
        settings = self.sampling(), {"seed": self.seed, "limit": self.max_tokens, "layers": layers}
        if tuned:
            talk = chat.RoleChat(generator, settings[0], **settings[1], context=model.seq_len)
        else:
            talk = chat.Chat(generator, settings[0], **settings[1])
        person = sys.stdin.isatty() and sys.stdout.isatty()
        if person:
            self._greet(run.checkpoint.step, tuned)
        while not talk.ended and (line := _next_line(person)) is not None:
            _answer(talk, line)
        return 0

    def _greet(self, step: int, tuned: bool) -> None:
        import readline  # noqa: F401, gives `input` a history and the arrow keys

        from moe_jax.runs.records import read_summary

        opening = read_summary(Path(self.run)).get("opening")
        what = "Ask" if tuned else "Type how a text begins"
        say(f"{self.run}, step {step}. {what}; /help lists the commands, Ctrl-D leaves.")
        if opening:
            say(f"try: {opening}")


def _next_line(person: bool) -> str | None:
    """The next line that is typed. None at the end, such as Ctrl-D."""
    try:
        return input("\n> " if person else "")
    except EOFError:
        if person:
            print()  # the shell's prompt begins a line of its own
        return None


def _answer(talk: "conversation.Chat", line: str) -> None:
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
            stream_text(prompt if talk.echoes else "", talk.reply(prompt))
        except KeyboardInterrupt:
            print("(ended by Ctrl-C)")
        if talk.layer is not None:
            _show_experts(talk, talk.layer)
    except UserError as error:
        say(error)


def _show_experts(talk: "conversation.Chat", layer: int) -> None:
    """Print the last text (of a tuned model, the whole conversation), each token in the colour of its first expert, and
    how many tokens each expert has.

    Without colours, the number of the expert stands behind each token.
    """
    from rich.text import Text

    tokens = talk.last_tokens()
    pieces = talk.generator.routed(tokens)
    first = [int(piece.experts[layer, 0]) for piece in pieces]
    console, shown = rich_console(), Text()
    for piece, expert in zip(pieces, first, strict=True):
        shown.append(piece.text, COLOURS[expert % len(COLOURS)])
        if console.color_system is None:
            shown.append(f"[{expert}]")
    if len(pieces) < len(tokens):
        shown.append(f"\n(the last {len(pieces)} tokens, as many as the context has)")
    legend = Text(f"\nlayer {layer}: ")
    for expert, count in Counter(first).most_common():
        legend.append(f"expert {expert}", COLOURS[expert % len(COLOURS)])
        legend.append(f" {count / len(first):.0%}  ")
    console.print(shown, legend, sep="\n", soft_wrap=not console.is_terminal)
