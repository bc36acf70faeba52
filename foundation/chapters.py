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


CHAPTERS = (
    Chapter("00_shapes_and_gradients", "What is a gradient of arrays, and how is one checked?", 20, "a derivative"),
    Chapter("01_scalar_autograd", "How can one sweep give the derivative in every input?", 20, "0"),
    Chapter(
        "02_backpropagation_xor",
        "Which products give a layer's gradients, and where does the mean's division belong?",
        25,
        "0, 1",
        ("linear", "mse"),
    ),
    Chapter(
        "03_activations_and_initialisation",
        "What do twenty layers do to a signal, and to its gradient?",
        25,
        "2",
        ("tanh", "sigmoid", "relu", "gelu_exact", "gelu", "silu"),
    ),
    Chapter(
        "04_softmax_and_cross_entropy",
        "Why is the gradient of a language model's loss p - onehot?",
        25,
        "2",
        ("softmax", "logsumexp", "cross_entropy"),
    ),
    Chapter(
        "05_attention",
        "How does a gradient get through attention, and why does the mask need no line?",
        35,
        "4",
        ("dropout", "attention", "multi_head", "share_heads"),
    ),
    Chapter(
        "06_normalisation_and_positions",
        "What does a normalisation take out of a gradient, and what undoes a rotation?",
        30,
        "2",
        (
            *("layernorm", "rmsnorm", "normalise_heads", "embedding"),
            *("tied_head", "learned_positions", "rope", "slowed_pairs"),
        ),
    ),
    Chapter(
        "07_a_transformer_that_writes",
        "Can the gradients so far train a model that writes?",
        30,
        "3 to 6, 20",
        ("feed_forward", "dense_block", "dense_model"),
    ),
    Chapter(
        "08_router_and_its_gradient",
        "What does a router learn from, if its choice has no gradient?",
        50,
        "4, 7",
        (
            *("router", "gelu_experts", "swiglu_experts", "dispatch", "combine", "moe"),
            *("biased_choice", "sigmoid_router", "balanced_by_bias"),
        ),
        ("model/moe/balance.py", "model/moe/router.py"),
    ),
    Chapter(
        "09_the_whole_model_by_hand",
        "Is the gradient of a whole mixture-of-experts model only bookkeeping?",
        30,
        "7, 8",
        ("block", "model"),
    ),
    Chapter(
        "10_where_a_step_comes_from",
        "Steepest, in which norm?",
        30,
        "2, 4",
        (
            "dual_norm",
            "steepest_step",
            "output_change",
            "orthogonalize",
            "divergence",
            "rank_one_fit",
            "adafactor",
            "adam",
            "muon",
        ),
        ("training/optimizers/adafactor.py", "training/optimizers/adam.py", "training/optimizers/muon.py"),
    ),
    Chapter(
        "11_flash_attention_both_ways",
        "Must the matrix of attention weights exist?",
        30,
        "5",
        ("merge_parts", "merged_output", "flash_attention"),
        ("model/kernels/causal_attention.py",),
    ),
    Chapter(
        "12_what_may_be_cached",
        "When is an output a function of the text before it?",
        40,
        "5, 6, 9",
        ("decode", "latent_attention", "absorbed", "window_mask", "kept_choices", "leaks"),
        ("inference/decode.py", "certify/causality.py", "model/moe/queues.py"),
    ),
    Chapter(
        "13_mean_of_means",
        "Are n micro-batches one batch?",
        25,
        "4, 8",
        ("accumulated_loss", "accumulated_value", "grouped_balance", "balance_gap"),
        ("training/step.py", "data/batches.py", "model/moe/balance.py"),
    ),
    Chapter(
        "14_from_a_trained_model",
        "What learns in the first step, if nothing has changed yet?",
        30,
        "8",
        ("upcycled", "upcycled_gradient", "low_rank", "merged"),
        ("training/initial_weights.py", "model/low_rank.py"),
    ),
    Chapter(
        "15_sampling_and_speculative_decoding",
        "Can a small model guess for a large one and change nothing?",
        25,
        "4",
        ("filtered_law", "accepted_mass", "speculative_law", "speculative_texts", "tokens_per_round"),
        ("inference/sampling.py",),
    ),
    Chapter(
        "16_what_a_step_costs",
        "What does a step cost?",
        30,
        "2, 7",
        ("step_flops", "steps_traffic", "power_law"),
        ("model/costs.py",),
    ),
    Chapter(
        "17_eight_bits_of_mantissa",
        "Why can a small step vanish?",
        25,
        "2, 10",
        ("nearest_bits", "drawn_bits", "mean_of_draws", "running_sum", "to_float16", "through_scale"),
        ("model/precision.py", "training/state.py"),
    ),
    Chapter(
        "18_weights_of_few_bits",
        "How few bits does a weight need, and which way should it be rounded?",
        30,
        "2, 8, 17",
        ("quantize", "coded_product", "output_error", "moved_by_one", "without", "gptq"),
        ("model/quantized.py",),
    ),
    Chapter(
        "19_collectives_and_their_adjoints",
        "What does a gradient do on its way back through many devices?",
        25,
        "8, 13",
        (
            *("copy_to_all", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"),
            *("ring_all_reduce", "tensor_parallel", "sharded", "expert_parallel"),
        ),
        ("parallel/experts.py", "parallel/layout.py"),
    ),
    Chapter(
        "20_byte_pairs",
        "Which pieces should a text be cut into?",
        25,
        "4",
        ("pair_counts", "replaced", "learn", "encode", "spelled"),
        ("data/tokenizers.py",),
    ),
    Chapter(
        "21_rewards_and_preferences",
        "Which KL does the KL term descend?",
        35,
        "4, 15",
        ("text_log_probs", "expected_reward", "group_baseline", "kl", "reverse_kl", "dpo", "clipped"),
    ),
)
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
