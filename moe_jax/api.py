"""What a notebook does with a trained model.

    run = moe_jax.load_run("runs/nano")
    run.generate("Once upon a time")              text
    run.logits("Once upon a time")                [N, V], one row a token
    run.evaluate("some other text")               loss, bits per byte, drops
    run.trace("Once upon a time")                 where every token went, layer by layer
    run.switch_off(0, 3)                          the same run, but layer 0 cannot choose expert 3
    run.force(0, 3)                               the same run, but layer 0 must choose expert 3
    run.ablation("Once upon a time")              what is lost without each expert, one at a time

`Run` is above all other folders but `cli`, because it uses several of them.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from moe_jax.config import UserError
from moe_jax.config.sampling import SamplingConfig
from moe_jax.data.token_store import token_stream
from moe_jax.inference.decode import Decoder, TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.traced_pass import TracedStep
from moe_jax.inspection.ablation import Ablation, ablation
from moe_jax.inspection.switches import switched_off, with_more_off
from moe_jax.inspection.trace import RoutingTrace, make_trace_step, routing_trace
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, Transformer, merge
from moe_jax.runs.catalog import run_folder
from moe_jax.runs.load import LoadedRun, open_run
from moe_jax.training.evaluate import Evaluation, EvaluationStep, evaluate_run, make_evaluation_step


@dataclass(frozen=True)
class Programs:
    """The jitted programs of one model definition. They take the parameters as an argument, so all runs of the same
    definition share them: a program that is compiled for one expert switched off serves every other."""

    graphdef: nnx.GraphDef
    writer: nnx.GraphDef
    """The definition for texts that are written token by token."""
    seq_len: int
    vocab_size: int

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.writer, self.seq_len, self.vocab_size)

    @cached_property
    def evaluation(self) -> EvaluationStep:
        return make_evaluation_step(self.graphdef)

    @cached_property
    def trace(self) -> TracedStep:
        return make_trace_step(self.graphdef)

    @cached_property
    def logits(self) -> Callable[[Params, np.ndarray], jax.Array]:
        def forward(params: Params, tokens: jax.Array) -> jax.Array:
            model = merge(self.graphdef, params)
            return model.logits(model(tokens, Mode.EVALUATE)[0])

        return jax.jit(forward)


shared_programs = lru_cache(maxsize=16)(Programs)


class Run(LoadedRun):
    """A trained model: `config`, `tokenizer`, `params`, and methods that use them.

    Every method compiles its program at the first call. Runs of the same shape share their programs.
    """

    @property
    def model(self) -> Transformer:
        """The Flax module with its trained parameters."""
        return merge(self.graphdef, self.params)

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 400,
        seed: int = 0,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> str:
        """The prompt and its continuation, which ends where the model ends the text, or after `max_tokens` tokens.

        The same arguments give the same text. `moe_jax.config.sampling.SamplingConfig` says what each does. Raises
        ConfigError for a value out of its range.
        """
        SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, seed)  # checks them
        settings = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return prompt + "".join(self.stream(prompt, settings, max_tokens=max_tokens, seed=seed))

    def stream(self, prompt: str, settings: Sampling, *, max_tokens: int = 400, seed: int = 0) -> Iterator[str]:
        """The continuation of a prompt, piece by piece, as it is drawn."""
        return self._generator.pieces(prompt, settings, seed=seed, limit=max_tokens)

    def logits(self, text: str | Sequence[int]) -> np.ndarray:
        """float32 [N, V]: row i has the logits of the token after token i.

        The N tokens of a text are the separator and its own, so row 0 predicts the first token of the text. Token ids
        are taken as they are. Raises UserError if there are more than the context, or an id that the model does not
        know.
        """
        known, seq_len = self.config.model.vocab_size, self.config.model.seq_len
        tokens = [self.tokenizer.separator_id, *self.tokenizer.encode(text)] if isinstance(text, str) else [*text]
        if len(tokens) > seq_len:
            raise UserError(
                f"{len(tokens)} tokens (a text begins with a separator), the context is {seq_len}; shorten it"
            )
        if wrong := [token for token in tokens if not 0 <= token < known]:
            raise UserError(f"token {wrong[0]}: must be from 0 to {known - 1}")
        padded = np.zeros((1, seq_len), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._programs.logits(self.params, padded)[0, : len(tokens)])

    def evaluate(self, text: str | None = None) -> Evaluation:
        """Loss, bits per byte and drops on a text. Without a text, the run's own validation text is used; of
        conversations, the answers.

        Raises UserError if the run's own text cannot be found. Warns if it has changed since the run was trained.
        """
        if text is None:
            store, changed = self.validation_text()
            stream = store.valid.stream
            if changed:
                warnings.warn(changed, stacklevel=2)
        else:
            stream = token_stream(iter([text.strip()]), self.tokenizer)
        return evaluate_run(self, stream, step=self._programs.evaluation)

    def trace(self, text: str) -> RoutingTrace:
        """Where every token of a text went: experts, gates, slots and drops, layer by layer."""
        return routing_trace(self, text, self._programs.trace)

    def ablation(self, text: str) -> Ablation:
        """Losses and stories without each expert, one at a time: what each of them is good for.

        Raises UserError where there is no other expert that could take its place.
        """
        return ablation(self, np.array([self.tokenizer.separator_id, *self.tokenizer.encode(text)], np.int32))

    def switch_off(self, layer: int, *experts: int) -> "Run":
        """The same run, but the router of a layer cannot choose these experts. It decides as if they did not exist:
        the next-best experts take their place, and the gates are renormalised. Nothing is trained again.

        Raises UserError where the model has no such layer or expert, and where no expert would be left.
        """
        return dataclasses.replace(self, **switched_off(self, with_more_off(self, layer, experts)))

    def force(self, layer: int, expert: int) -> "Run":
        """The same run, but every token of a layer goes to this expert alone, with the gate 1."""
        others = [e for e in range(self.config.model.experts) if e != expert]
        with_more_off(self, layer, [expert])  # raises an error where there is no such expert
        return self.switch_off(layer, *others)

    @property
    def _programs(self) -> Programs:
        return shared_programs(self.graphdef, self.writer, self.config.model.seq_len, self.tokenizer.vocab_size)

    @cached_property
    def _generator(self) -> TextGenerator:
        seq_len = self.config.model.seq_len
        return TextGenerator(self.writer, self.params, self.tokenizer, seq_len, self._programs.decoder)


def load_run(path: str | Path, step: int | None = None) -> Run:
    """Open the run in a folder: its best checkpoint, or the checkpoint of a step. "nano" and "stories" are models that
    come with the package, unless there is such a folder here or in `runs/`.

    Raises UserError if the folder holds no run, or if the checkpoint is damaged.
    """
    opened = open_run(run_folder(str(path)), step, "load_run")
    return Run(**{f.name: getattr(opened, f.name) for f in dataclasses.fields(opened)})
