"""The chapters, the path through them, and which operations of the table belong to each. The standard library alone, so
that a wrong name is answered at once."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """One notebook."""

    stem: str
    """Name of its file, which begins with its number."""
    question: str
    minutes: int
    """To read it, run it and try its exercises."""
    needs: str
    """What a reader should know before."""
    operations: tuple[str, ...] = ()
    """Its rows of the table of `python -m foundation`."""
    production: tuple[str, ...] = ()
    """Files of `moe_jax` whose mathematics it derives. Each names the chapter, and the notebook names each."""

    @property
    def number(self) -> str:
        """As it is typed: 7."""
        return str(int(self.stem.partition("_")[0]))


_TABLE = """\
00_shapes_and_gradients, 20 minutes, after a derivative
    What is a gradient of arrays, and how is one checked?

01_scalar_autograd, 20 minutes, after 0
    How can one sweep give the derivative in every input?

02_backpropagation_xor, 25 minutes, after 0, 1
    Which products give a layer's gradients, and where does the mean's division belong?
    linear mse

03_activations_and_initialisation, 25 minutes, after 2
    What do twenty layers do to a signal, and to its gradient?
    tanh sigmoid relu gelu_exact gelu silu

04_softmax_and_cross_entropy, 25 minutes, after 2
    Why is the gradient of a language model's loss p - onehot?
    softmax logsumexp cross_entropy

05_attention, 35 minutes, after 4
    How does a gradient get through attention, and why does the mask need no line?
    dropout attention multi_head share_heads

06_normalisation_and_positions, 30 minutes, after 2
    What does a normalisation take out of a gradient, and what undoes a rotation?
    layernorm rmsnorm normalise_heads embedding tied_head learned_positions rope slowed_pairs

07_a_transformer_that_writes, 30 minutes, after 3 to 6, 20
    Can the gradients so far train a model that writes?
    feed_forward dense_block dense_model

08_router_and_its_gradient, 50 minutes, after 4, 7
    What does a router learn from, if its choice has no gradient?
    router gelu_experts swiglu_experts dispatch combine moe biased_choice sigmoid_router balanced_by_bias
    moe_jax: model/moe/balance.py model/moe/router.py

09_the_whole_model_by_hand, 30 minutes, after 7, 8
    Is the gradient of a whole mixture-of-experts model only bookkeeping?
    block model

10_where_a_step_comes_from, 30 minutes, after 2, 4
    Steepest, in which norm?
    dual_norm steepest_step output_change orthogonalize divergence rank_one_fit adafactor adam muon
    moe_jax: training/optimizers/adafactor.py training/optimizers/adam.py training/optimizers/muon.py

11_flash_attention_both_ways, 30 minutes, after 5
    Must the matrix of attention weights exist?
    merge_parts merged_output flash_attention
    moe_jax: model/kernels/causal_attention.py

12_what_may_be_cached, 40 minutes, after 5, 6, 9
    When is an output a function of the text before it?
    decode latent_attention absorbed window_mask kept_choices leaks
    moe_jax: inference/decode.py certify/causality.py model/moe/queues.py

13_mean_of_means, 25 minutes, after 4, 8
    Are n micro-batches one batch?
    accumulated_loss accumulated_value grouped_balance balance_gap
    moe_jax: training/step.py data/batches.py model/moe/balance.py

14_from_a_trained_model, 30 minutes, after 8
    What learns in the first step, if nothing has changed yet?
    upcycled upcycled_gradient low_rank merged
    moe_jax: training/initial_weights.py model/low_rank.py

15_sampling_and_speculative_decoding, 25 minutes, after 4
    Can a small model guess for a large one and change nothing?
    filtered_law accepted_mass speculative_law speculative_texts tokens_per_round
    moe_jax: inference/sampling.py

16_what_a_step_costs, 30 minutes, after 2, 7
    What does a step cost?
    step_flops steps_traffic power_law
    moe_jax: model/costs.py

17_eight_bits_of_mantissa, 25 minutes, after 2, 10
    Why can a small step vanish?
    nearest_bits drawn_bits mean_of_draws running_sum to_float16 through_scale
    moe_jax: model/precision.py training/state.py

18_weights_of_few_bits, 30 minutes, after 2, 8, 17
    How few bits does a weight need, and which way should it be rounded?
    quantize coded_product output_error moved_by_one without gptq
    moe_jax: model/quantized.py

19_collectives_and_their_adjoints, 25 minutes, after 8, 13
    What does a gradient do on its way back through many devices?
    copy_to_all all_reduce all_gather reduce_scatter all_to_all ring_all_reduce tensor_parallel sharded
    expert_parallel
    moe_jax: parallel/experts.py parallel/layout.py

20_byte_pairs, 25 minutes, after 4
    Which pieces should a text be cut into?
    pair_counts replaced learn encode spelled
    moe_jax: data/tokenizers.py

21_rewards_and_preferences, 35 minutes, after 4, 15
    Which KL does the KL term descend?
    text_log_probs expected_reward group_baseline kl reverse_kl dpo clipped
"""
"""A paragraph for each chapter: its notebook, its question, its operations, and files whose mathematics it derives."""


def _chapter(paragraph: str) -> Chapter:
    first, question, *lists = (line.strip() for line in paragraph.splitlines())
    stem, minutes, needs = first.split(", ", 2)
    rows = " ".join(line for line in lists if not line.startswith("moe_jax: ")).split()
    files = " ".join(line.removeprefix("moe_jax: ") for line in lists if line.startswith("moe_jax: ")).split()
    needs = needs.removeprefix("after ")
    return Chapter(stem, question, int(minutes.removesuffix(" minutes")), needs, tuple(rows), tuple(files))


CHAPTERS = tuple(map(_chapter, _TABLE.split("\n\n")))
PATH = {
    "The course": ("0", "1", "2", "3", "4", "5", "6", "20", "7", "8", "9"),
    "Training": ("10", "13", "14", "17"),
    "Inference": ("11", "12", "15", "18"),
    "Systems": ("16", "19"),
    "Alignment": ("21",),
}
"""The order in which to read: a course, then electives, each by itself. The README and the book's sidebar follow it."""
OPERATIONS = tuple(operation for chapter in CHAPTERS for operation in chapter.operations)


def part(name: str) -> tuple[Chapter, ...]:
    """The chapters of a part of the path, in its order."""
    numbered = {chapter.number: chapter for chapter in CHAPTERS}
    return tuple(numbered[number] for number in PATH[name])


class UnknownName(Exception):
    """A name that nobody knows. The message is one line, with the near names."""


def selected(names: list[str]) -> tuple[str, ...]:
    """The operations of the names, each an operation, or a chapter by its number or its notebook.

    Raises UnknownName.
    """
    chapters = {key: chapter for chapter in CHAPTERS for key in (chapter.number, chapter.stem[:2], chapter.stem)}
    found: list[str] = []
    for name in names:
        stem = name.removesuffix(".ipynb").removesuffix(".py")
        if name in OPERATIONS:
            found.append(name)
        elif stem not in chapters:
            known = f"an operation, or a chapter from 0 to {CHAPTERS[-1].number}"
            raise UnknownName(unknown("name", name, [*OPERATIONS, *chapters], known))
        elif not chapters[stem].operations:
            with_rows = ", ".join(chapter.number for chapter in CHAPTERS if chapter.operations)
            raise UnknownName(f"{name}: chapter without rows in the table; its notebook checks it. Rows: {with_rows}")
        else:
            found.extend(chapters[stem].operations)
    return tuple(dict.fromkeys(found))


def unknown(kind: str, name: str, known: list[str], allowed: str) -> str:
    """One line about an unknown name: the near names, or else what is allowed."""
    simple = {candidate.replace("_", ""): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), simple, n=3, cutoff=0.5)
    near += [key for key in simple if len(name) > 2 and name.lower() in key and key not in near][:3]
    advice = "near it: " + ", ".join(simple[key] for key in near) if near else f"give {allowed}"
    return f"{kind} {name}: unknown; {advice}"
