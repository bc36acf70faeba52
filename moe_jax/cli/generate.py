"""`moe-jax generate` and `chat`: text that a trained model writes."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.cli.command import MOST_ACTIVE, ModelCommand, check_range
from moe_jax.config import UserError
from moe_jax.system import environment
from moe_jax.system.terminal import say, stream_text, working

if TYPE_CHECKING:
    from moe_jax.inference import chat as conversation
    from moe_jax.inference.generate import TextGenerator
    from moe_jax.inference.sampling import Sampling
    from moe_jax.runs.load import LoadedRun


@dataclass(frozen=True, kw_only=True)
class SamplingCommand(ModelCommand):
    """A command that draws text from a trained model."""

    temperature: float = 0.8
    """Above 1 texts are more surprising, below 1 more usual. 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Draw among the tokens with at least this share of the likeliest token's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less likely; 1 is off."""
    max_tokens: int = 400
    """Longest continuation, in tokens. A text ends earlier where the model ends it."""
    seed: int = 0
    """The same seed gives the same texts."""
    active: int = 0
    """Experts that a token chooses, fewer than in training: faster, and less good. 0: as trained."""

    def check(self) -> None:
        """Raise ConfigError if a value is out of range."""
        super().check()
        check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        check_range("--active", self.active, 0, MOST_ACTIVE)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--top-k", self.top_k, 0, 2**24)
        check_range("--top-p", self.top_p, 1e-6, 1)
        check_range("--min-p", self.min_p, 0, 1)
        check_range("--repetition-penalty", self.repetition_penalty, 1e-3, 1e3)
        check_range("--seed", self.seed, 0, 2**31 - 1)

    def open(self) -> "tuple[LoadedRun, TextGenerator, Sampling]":
        """The model, loaded, and how it draws."""
        from moe_jax.inference.generate import TextGenerator
        from moe_jax.inference.sampling import Sampling
        from moe_jax.runs.load import open_run, with_fewer_experts

        run = open_run(self.run, self.step)
        run = with_fewer_experts(run, self.active) if self.active else run
        settings = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return run, TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len), settings


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingCommand):
    """Continue a text with a trained model."""

    prompt: str = ""
    """How each text begins."""
    num_stories: int = 1
    """Texts to write. Each has random draws of its own."""

    def execute(self) -> int:
        self.check()
        check_range("--num-stories", self.num_stories, 1, 10_000)
        environment.prepare_environment()
        with working(f"loading {self.name}; the first start compiles for some seconds"):
            run, generator, settings = self.open()
            prompt = run.tokenizer.encode(self.prompt)  # raises if it cannot be encoded, before anything is printed
            generator.compile(1 + len(prompt))
        for number in range(self.num_stories):
            if self.num_stories > 1:
                print(f"--- {number + 1}")
            pieces = generator.pieces(self.prompt, settings, seed=self.seed, number=number, limit=self.max_tokens)
            stream_text(self.prompt, pieces)
        return 0


@dataclass(frozen=True, kw_only=True)
class Chat(SamplingCommand):
    """Give a trained model the beginnings of texts, and read how it goes on. The model is loaded and compiled once.

    A line is a beginning; the model continues it, word by word. For a run that is tuned on conversations (`sft`) a line
    is a question; the model answers, and remembers what was said before. A line such as /temp 0.5 changes a setting,
    and /help lists them. Ctrl-C ends the present text, Ctrl-D leaves. If the input is a file or a pipe, each of its
    lines is answered in turn, without colours or other output.
    """

    def execute(self) -> int:
        self.check()
        environment.prepare_environment()
        person = sys.stdin.isatty() and sys.stdout.isatty()
        talk = self._begin(person)
        while not talk.ended and (line := _next_line(person)) is not None:
            _answer(talk, line)
        return 0

    def _begin(self, person: bool) -> "conversation.Chat":
        with working(f"loading {self.name}; the first start compiles for some seconds"):
            from moe_jax.inference import chat
            from moe_jax.inference.decode import SHORT_PROMPT

            run, generator, settings = self.open()
            tuned = run.converses
            generator.compile(SHORT_PROMPT if tuned else 1)  # the roles of a question are tokens too
        if person:
            self._greet(run.checkpoint.step, tuned)
        if not tuned:
            return chat.Chat(generator, settings, seed=self.seed, limit=self.max_tokens)
        context = run.config.model.seq_len
        return chat.RoleChat(generator, settings, seed=self.seed, limit=self.max_tokens, context=context)

    def _greet(self, step: int, tuned: bool) -> None:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401, gives `input` a history and the arrow keys

        from moe_jax.runs.records import read_summary

        opening = read_summary(Path(self.run)).get("opening")
        what = "Ask" if tuned else "Type how a text begins"
        say(f"{self.name}, step {step}. {what}; /help lists the commands, Ctrl-D leaves.")
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
    except UserError as error:
        say(error)
