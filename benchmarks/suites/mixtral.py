"""The peer of `benchmark.py peers`: Mixtral of Hugging Face transformers, in PyTorch, in a process of its own.

Two frameworks in one process would compete for threads and memory, and the waiting threads of one would slow the
other. So this program is separate, and it does not import jax. It builds the model and reads names of candidates from
its standard input. For each name it runs the candidate once and prints the seconds. Between runs it sleeps.

    python benchmarks/suites/mixtral.py '{"width": 512, ...}'
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

EXPERTS = ("eager", "grouped_mm")
"""The two implementations of the experts in transformers: a loop over the experts, and grouped matrix products."""


class Shape(NamedTuple):
    """The model that both sides build. The names are those of `ModelConfig` and `TrainConfig`."""

    vocab_size: int
    seq_len: int
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    experts: int
    top_k: int
    expert_hidden: int
    batch_size: int
    prompt: int
    """Tokens of the prefill."""
    aux_loss_coef: float
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    max_grad_norm: float
    threads: int
    precisions: list[str]
    """Dtypes of the products in a training step and a prefill, each a candidate: `float32`, `bfloat16`. Parameters and
    moments in training are float32."""


def build(shape: Shape) -> Any:
    """A Mixtral of this shape with random float32 parameters."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import MixtralConfig, MixtralForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.expert_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_width,
        max_position_embeddings=shape.seq_len,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        router_aux_loss_coef=shape.aux_loss_coef,
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue], transformers declares it nowhere
    )
    return MixtralForCausalLM(config).float()


def candidates(shape: Shape, models: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The runs by name: training step of a batch and prefill of one prompt in each precision (`train-float32`), forward
    pass of the batch, and decoding of one token at position T/2. `models` has the model with weights of each
    precision; the one in float32 does all but the prefills."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

    def tokens(*size: int) -> Any:
        return torch.randint(shape.vocab_size, size)

    model = models["float32"]
    batch, prompt, token = tokens(shape.batch_size, shape.seq_len), tokens(1, shape.prompt), tokens(1, 1)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=shape.lr,
        betas=(shape.beta1, shape.beta2),
        weight_decay=shape.weight_decay,
        fused=True,
    )
    cache, half = DynamicCache(config=model.config), shape.seq_len // 2
    with torch.inference_mode():
        model(tokens(1, half), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def train(precision: str) -> Any:
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(batch, labels=batch, use_cache=False, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shape.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def evaluating(run: Callable[[Any], Any], model: Any = model) -> Callable[[], Any]:
        def call() -> Any:
            model.eval()
            with torch.inference_mode():
                return run(model)

        return call

    def read(model: Any) -> Any:
        return model(prompt, use_cache=True, logits_to_keep=1)

    def decode(model: Any) -> Any:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)  # a run may decode more tokens than the context has positions
        return logits

    return {
        **{f"train-{precision}": partial(train, precision) for precision in shape.precisions},
        "forward": evaluating(lambda model: model(batch, use_cache=False).logits),
        **{f"prefill-{precision}": evaluating(read, models[precision]) for precision in shape.precisions},
        "decode": evaluating(decode),
    }


def serve(shape: Shape) -> None:
    """Print the names of the candidates and the number of parameters. Then time one candidate for each input line."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(shape.threads)
    model = build(shape)
    models = {name: model if name == "float32" else copy.deepcopy(model).bfloat16() for name in shape.precisions}
    runs = candidates(shape, models)
    about = {
        "candidates": [f"{name} {experts}" for name in runs for experts in EXPERTS],
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        name, experts = line.split()
        # Both implementations use one model: two models, with gradients and moments, would not fit beside ours.
        for chosen in models.values():
            chosen.set_experts_implementation(experts)
            if chosen.config._experts_implementation != experts:
                raise ValueError(f"transformers uses {chosen.config._experts_implementation} experts, not {experts}")
        begin = time.perf_counter()
        runs[name]()
        print(json.dumps(time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    serve(Shape(**json.loads(sys.argv[1])))
