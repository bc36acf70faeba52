"""`moe-jax chat`."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe_jax.cli.sampling import SamplingCommand
from moe_jax.config import UserError
from moe_jax.system import environment
from moe_jax.system.terminal import say, stream_text, working

if TYPE_CHECKING:
    from moe_jax.inference.chat import Chat as Conversation
    from moe_jax.inference.token_experts import TokenExperts

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
            from moe_jax.inference.token_experts import TokenExperts
            from moe_jax.runs.load import open_run

            run = open_run(self.run, self.step)
            generator = TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)
            generator.compile()
        try:
            experts = TokenExperts(run.writer, run.params, run.tokenizer, run.config.model)
        except UserError:  # there is no router to look into
            experts = None
        layers = run.config.model.layers if experts else 0
        given = {"seed": self.seed, "limit": self.max_tokens, "layers": layers}
        if run.config.data.format == "chat":
            context = run.config.model.seq_len
            talk = chat.RoleChat(generator, self.sampling(), **given, tokenizer=run.tokenizer, context=context)
        else:
            talk = chat.Chat(generator, self.sampling(), **given)
        person = sys.stdin.isatty() and sys.stdout.isatty()
        if person:
            self._greet(run.checkpoint.step, tuned=run.config.data.format == "chat")
        while not talk.ended and (line := _ask(person)) is not None:
            _answer(talk, experts, line)
        return 0

    def _greet(self, step: int, tuned: bool) -> None:
        import readline  # noqa: F401, gives `input` a history and the arrow keys

        from moe_jax.runs.records import read_summary

        opening = read_summary(Path(self.run)).get("opening")
        what = "Ask" if tuned else "Type how a text begins"
        say(f"{self.run}, step {step}. {what}; /help lists the commands, Ctrl-D leaves.")
        if opening:
            say(f"try: {opening}")


def _ask(person: bool) -> str | None:
    """The next line that is typed. None at the end, such as Ctrl-D."""
    try:
        return input("\n> " if person else "")
    except EOFError:
        if person:
            print()  # the shell's prompt begins a line of its own
        return None


def _answer(talk: "Conversation", experts: "TokenExperts | None", line: str) -> None:
    """Answer one line: obey it, or continue it."""
    try:
        if line.strip() == "/again":
            line = talk.again()
        elif line.startswith("/") and not line.startswith("//"):
            said = talk.command(line)
            if said:
                say(said)
            return
        prompt = line.removeprefix("/") if line.startswith("//") else line
        try:
            stream_text("" if talk.last_tokens is not None else prompt, talk.reply(prompt))
        except KeyboardInterrupt:
            print("(ended by Ctrl-C)")
        if talk.layer is not None and experts is not None:
            _show_experts(experts, talk, talk.layer)
    except UserError as error:
        say(error)


def _show_experts(experts: "TokenExperts", talk: "Conversation", layer: int) -> None:
    """Print the last text (of a tuned model, the whole conversation), each token in the colour of its first expert, and
    how many tokens each expert has.

    Without colours, the number of the expert stands behind each token.
    """
    from rich.text import Text

    from moe_jax.system.terminal import rich_console

    tokens = talk.last_tokens
    pieces = experts.of(talk.last_text) if tokens is None else experts.of_tokens(tokens)
    first = [int(piece.experts[layer, 0]) for piece in pieces]
    console, shown = rich_console(), Text()
    coloured = console.color_system is not None
    for piece, expert in zip(pieces, first, strict=True):
        shown.append(piece.text, COLOURS[expert % len(COLOURS)])
        if not coloured:
            shown.append(f"[{expert}]")
    whole = len(talk.last_text) if tokens is None else len(tokens)
    shown_of_it = len("".join(piece.text for piece in pieces)) if tokens is None else len(pieces)
    if shown_of_it < whole:
        shown.append(f"\n(the last {len(pieces)} tokens, as many as the context has)")
    legend = Text(f"\nlayer {layer}: ")
    for expert, count in Counter(first).most_common():
        legend.append(f"expert {expert}", COLOURS[expert % len(COLOURS)])
        legend.append(f" {count / len(first):.0%}  ")
    console.print(shown, legend, sep="\n", soft_wrap=not console.is_terminal)
