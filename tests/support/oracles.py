"""Slow NumPy loops that compute what the model must compute. They share no code with moe_jax.

Everything is float64. Shapes: B sequences, T tokens, D width, E experts, K choices, C slots, F hidden width.
"""

import math

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def logsumexp(z: np.ndarray) -> float:
    top = z.max()
    return float(top + math.log(np.exp(z - top).sum()))


def choose(logits: np.ndarray, top_k: int) -> list[int]:
    """The K experts of one token, best first. Of equal logits the lower index comes first."""
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]


def gates(logits: np.ndarray, chosen: list[int], renormalise: bool = True) -> list[float]:
    """For one choice p itself; for more choices p renormalised over them, in a form that cannot underflow to 0 / 0.
    Without `renormalise`, p itself for any number of choices."""
    if len(chosen) == 1 or not renormalise:
        return [float(softmax(logits)[e]) for e in chosen]
    return list(softmax(np.array([logits[e] for e in chosen])))


def assign(chosen: list[list[int] | None], capacity: int) -> list[list[int | None]]:
    """The slot of each choice of each token of one sequence; None if it is dropped. A token that is None is invalid.

    The order is token-major: earlier tokens first, and the choices of one token in their order.
    """
    used: dict[int, int] = {}
    slots: list[list[int | None]] = []
    for choices in chosen:
        mine: list[int | None] = []
        for e in choices or []:
            taken = used.get(e, 0)
            mine.append(taken if taken < capacity else None)
            used[e] = taken + 1
        slots.append(mine)
    return slots


def expert(x: np.ndarray, w_in: np.ndarray, w_out: np.ndarray, w_gate: np.ndarray) -> np.ndarray:
    """One token through one expert, with swiglu."""
    g = x @ w_gate
    return (g / (1 + np.exp(-g)) * (x @ w_in)) @ w_out


def moe(
    x: np.ndarray,
    router: np.ndarray,
    w_in: np.ndarray,
    w_out: np.ndarray,
    w_gate: np.ndarray,
    top_k: int,
    capacity: int,
    renormalise: bool = True,
) -> tuple[np.ndarray, int]:
    """An MoE layer on [B, T, D]: its output, and how many (token, choice) pairs were dropped."""
    y, dropped = np.zeros_like(x), 0
    for b in range(x.shape[0]):
        logits = [x[b, t] @ router for t in range(x.shape[1])]
        chosen = [choose(z, top_k) for z in logits]
        for t, slots in enumerate(assign(chosen, capacity)):
            for e, g, slot in zip(chosen[t], gates(logits[t], chosen[t], renormalise), slots, strict=True):
                if slot is None:
                    dropped += 1
                else:
                    y[b, t] += g * expert(x[b, t], w_in[e], w_out[e], w_gate[e])
    return y, dropped


def cross_entropy(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray) -> list[float]:
    """The cross-entropy of each target, in nats."""
    return [logsumexp(h @ head) - float((h @ head)[t]) for h, t in zip(hidden, targets, strict=True)]


def adamw(
    p: np.ndarray, grads: list[np.ndarray], rates: list[float], beta1: float, beta2: float, eps: float, decay: float
) -> np.ndarray:
    """Parameters after AdamW steps (Loshchilov and Hutter 2019, algorithm 2; the decay is multiplied by the rate)."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        p = p - rate * (step + decay * p)
    return p


def muon(gradients: np.ndarray, decay: float = 0.95) -> np.ndarray:
    """Muon's direction for one matrix after the gradients [N, rows, columns] (Jordan et al. 2024), in float64.

    m <- decay m + (1 - decay) g, both corrected for the zero that m starts from; Nesterov's look ahead, decay m + (1 -
    decay) g; then five times X <- a X + (b S + c S S) X with S = X X^T. The matrix is transposed if it is tall.
    """
    m = np.zeros(gradients.shape[1:])
    for g in gradients:
        m = decay * m + (1 - decay) * g
    n = len(gradients)
    x = decay * m / (1 - decay ** (n + 1)) + (1 - decay) * gradients[-1] / (1 - decay**n)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if tall else x
