"""A mixture-of-experts language model in one file of NumPy: text, model, backward pass by hand, training, writing.

    uv run python foundation/one_file.py       about two minutes on two cores

A token is a character. Each of L blocks adds two things to the stream x [B, T, D] (B sequences of T tokens):

    x <- x + attention(rmsnorm(x))             a token reads the tokens before it
    x <- x + mixture(rmsnorm(x))               a router sends each token to K of E small networks, the experts

and the next token's logits are rmsnorm(x) embedding^T. The loss is

    nats per character  +  BALANCE * mean over layers of the balance loss

A gradient has the name of its array with d_ in front: d_x[b, t, i] = d loss / d x[b, t, i], in the shape of x. Every
forward function is followed by its backward function: it gets the gradient of what the forward function returned, and
what the forward function kept, and returns the gradient of what it was given. Two rules do most of the work:

    y = x W        d_x = d_y W^T          d_W = x^T d_y, summed over all tokens
    y = a + b      d_a = d_b = d_y        and an array that is used twice gets the sum of both gradients

Chapters 4 to 9 of `foundation` derive each line; the sources stand at the functions.
"""

import math
import time
from pathlib import Path

import numpy as np

L, D, H, E, K, F = 2, 96, 4, 8, 2, 96  # layers, width, heads, experts, experts of a token, width of an expert
T, B, STEPS = 128, 8, 2300  # tokens of a sequence, sequences of a step, steps
CAPACITY = math.ceil(1.25 * T * K / E)  # tokens of a sequence that an expert takes; even shares would be T K / E
BALANCE, RATE, DECAY = 0.01, 4e-3, 0.1  # weight of the balance loss, peak learning rate, weight decay


# The text: one story a line, in characters.

stories = Path(__file__).with_name("stories.txt").read_text(encoding="utf-8")
alphabet = sorted(set(stories))
V = len(alphabet)
text = np.array([alphabet.index(character) for character in stories])
train_text, held_out = text[: 9 * len(text) // 10], text[9 * len(text) // 10 :]


def init(rng):
    """The parameters by name; what a block has, with the layer as the first axis. The embedding is the head, too.

    They are normal. A matrix has the standard deviation 1 / sqrt(rows), so that y = x W is as large as x. Those that
    write into the stream are smaller by sqrt(2 L), since 2 L such parts are summed there."""
    params = {"embedding": 0.02 * rng.normal(size=(V, D))}
    for name, *shape in (
        ("qkv", D, 3 * D), ("out", D, D), ("router", D, E), ("w_gate", E, D, F), ("w_in", E, D, F), ("w_out", E, F, D),
    ):  # fmt: skip
        std = (1 / math.sqrt(2 * L) if name in ("out", "w_out") else 1) / math.sqrt(shape[-2])
        params[name] = std * rng.normal(size=(L, *shape))
    params |= {"norm1": np.ones((L, D)), "norm2": np.ones((L, D)), "norm": np.ones(D)}
    return {name: array.astype(np.float32) for name, array in params.items()}


def softmax(z):
    """p_i = exp(z_i) / sum_j exp(z_j) over the last axis. Subtracting the largest z changes nothing but overflow."""
    exp = np.exp(z - z.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def softmax_backward(d_p, p):
    """dp_i/dz_j = p_i (1[i = j] - p_j), so d_z = p (d_p - <d_p, p>)."""
    return p * (d_p - (d_p * p).sum(-1, keepdims=True))


def matrix_gradient(x, d_y):
    """d_W = x^T d_y of y = x W: the sum over all tokens of the outer product of x_t and d_y_t."""
    return x.reshape(-1, x.shape[-1]).T @ d_y.reshape(-1, d_y.shape[-1])


# RMSNorm (Zhang and Sennrich 2019, equation 4): n = r x with r = (mean(x^2) + eps)^(-1/2), y = scale n.


def rmsnorm(x, scale):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    n = r * x
    return scale * n, (n, r, scale)


def rmsnorm_backward(d_y, kept):
    """r depends on every x_j: dr/dx_j = -r^3 x_j / D. Hence the second term of d_x = r (d_n - n mean(d_n n))."""
    n, r, scale = kept
    d_n = scale * d_y
    d_x = r * (d_n - n * (d_n * n).mean(-1, keepdims=True))
    return d_x, (d_y * n).sum((0, 1))


# Attention (Vaswani et al. 2017, section 3.2): o = softmax(q k^T / sqrt(A)) v in each of H heads of width A = D / H.


def split_heads(x):
    """[B, T, D] -> [B, H, T, A]."""
    return x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2)


def join_heads(x):
    """[B, H, T, A] -> [B, T, D], the way back."""
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def rotate(x, way=1):
    """RoPE (Su et al. 2021, section 3.2.2): turns the pair (x_i, x_(i + A/2)) of the token at t by t 10000^(-2i/A), so
    that q k^T depends on distances alone. The transpose of a rotation is the rotation back: way = -1."""
    half = x.shape[-1] // 2
    angle = way * np.arange(x.shape[-2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention(x, qkv, out):
    q, k, v = map(split_heads, np.split(x @ qkv, 3, -1))
    q, k = rotate(q), rotate(k)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // H)  # [B, H, T, T]: row t is the query of token t
    scores[..., ~np.tri(x.shape[1], dtype=bool)] = -np.inf  # no token reads a later one
    w = softmax(scores)
    o = join_heads(w @ v)
    return o @ out, (x, qkv, out, q, k, v, w, o)


def attention_backward(d_y, kept):
    x, qkv, out, q, k, v, w, o = kept
    d_out = matrix_gradient(o, d_y)
    d_o = split_heads(d_y @ out.T)
    d_v = w.swapaxes(-1, -2) @ d_o
    d_w = d_o @ v.swapaxes(-1, -2)
    d_scores = softmax_backward(d_w, w) / math.sqrt(D // H)  # 0 where masked: w is 0 there
    d_q = rotate(d_scores @ k, way=-1)
    d_k = rotate(d_scores.swapaxes(-1, -2) @ q, way=-1)
    d_projected = np.concatenate([join_heads(d_q), join_heads(d_k), join_heads(d_v)], -1)
    return d_projected @ qkv.T, matrix_gradient(x, d_projected), d_out


# The router (Shazeer et al. 2017, equations 3 to 5; Fedus et al. 2021, equations 4 to 6).


def route(x, router, capacity):
    """p = softmax(x router) are the probabilities of the E experts. A token goes to the K likeliest; their gates g are
    a softmax of the K logits. In each sequence an expert takes the first `capacity` tokens that come; later ones are
    dropped there, and only the stream carries them on. The balance loss E sum_e f_e p_e is 1 where all is even: f_e is
    the share of the choices that went to e, p_e the mean probability of e, in a sequence."""
    z = x @ router
    p = softmax(z)
    chosen = np.argsort(-z, axis=-1, kind="stable")[..., :K]  # [B, T, K]
    g = softmax(np.take_along_axis(z, chosen, -1))
    is_choice = chosen.reshape(len(x), -1, 1) == np.arange(E)  # [B, T K, E], a token's choices in order
    place = np.cumsum(is_choice, 1)[is_choice].reshape(chosen.shape)  # 1 for the first token of an expert
    f = is_choice.mean(1, dtype=x.dtype)
    balance = E * (f * p.mean(1)).sum(-1).mean()
    return g, chosen, place <= capacity, f, balance, (x, router, p, g, chosen, f)


def route_backward(d_g, d_balance, kept):
    """Which experts are chosen does not change under a small change of z, so no gradient goes through the choice, nor
    through f, which counts choices. The gradient comes through the gates and through p."""
    x, router, p, g, chosen, f = kept
    d_p = d_balance * E * f[:, None] / (x.shape[0] * x.shape[1])  # [B, 1, E], the same for all tokens
    d_z = softmax_backward(np.broadcast_to(d_p, p.shape), p)
    d_chosen = softmax_backward(d_g, g) + np.take_along_axis(d_z, chosen, -1)
    np.put_along_axis(d_z, chosen, d_chosen, -1)
    return d_z @ router.T, matrix_gradient(x, d_z)


# The experts (Shazeer 2020, equation 6): expert(u) = (silu(u w_gate) * (u w_in)) w_out with silu(a) = a sigmoid(a).


def experts(x, g, chosen, taken, w_gate, w_in, w_out):
    """y_t = sum over the experts e of token t of g_te expert_e(x_t)."""
    y, kept = np.zeros_like(x), []
    for e in range(E):
        b, t, k = np.nonzero((chosen == e) & taken)  # n tokens that expert e takes, and which of their choices it is
        u = x[b, t]  # [n, D]
        a, c = u @ w_gate[e], u @ w_in[e]  # [n, F]
        sigmoid = 1 / (1 + np.exp(-a))
        h = a * sigmoid * c
        v = h @ w_out[e]
        y[b, t] += g[b, t, k, None] * v  # a token has an expert at most once, so no place occurs twice
        kept.append((b, t, k, u, a, c, sigmoid, h, v))
    return y, (g, w_gate, w_in, w_out, kept)


def experts_backward(d_y, kept):
    """silu'(a) = sigmoid(a) (1 + a (1 - sigmoid(a)))."""
    g, w_gate, w_in, w_out, kept = kept
    d_x, d_g = np.zeros_like(d_y), np.zeros_like(g)
    d_w_gate, d_w_in, d_w_out = np.zeros_like(w_gate), np.zeros_like(w_in), np.zeros_like(w_out)
    for e, (b, t, k, u, a, c, sigmoid, h, v) in enumerate(kept):
        d_g[b, t, k] = (d_y[b, t] * v).sum(-1)  # the gate scales v, so its gradient is a dot product; dropped: 0
        d_v = g[b, t, k, None] * d_y[b, t]
        d_h = d_v @ w_out[e].T
        d_a = d_h * c * sigmoid * (1 + a * (1 - sigmoid))
        d_c = d_h * a * sigmoid
        d_w_gate[e], d_w_in[e], d_w_out[e] = u.T @ d_a, u.T @ d_c, h.T @ d_v
        d_x[b, t] += d_a @ w_gate[e].T + d_c @ w_in[e].T
    return d_x, d_g, d_w_gate, d_w_in, d_w_out


def forward(params, tokens, capacity):
    """(logits [B, T, V], mean balance loss, f of each layer, what the backward pass needs)."""
    x, balances, loads, kept = params["embedding"][tokens], [], [], []
    for i in range(L):
        n, kept_norm1 = rmsnorm(x, params["norm1"][i])
        y, kept_attention = attention(n, params["qkv"][i], params["out"][i])
        x = x + y
        n, kept_norm2 = rmsnorm(x, params["norm2"][i])
        g, chosen, taken, f, balance, kept_route = route(n, params["router"][i], capacity)
        y, kept_experts = experts(n, g, chosen, taken, *(params[name][i] for name in ("w_gate", "w_in", "w_out")))
        x = x + y
        balances.append(balance)
        loads.append(f.mean(0))
        kept.append((kept_norm1, kept_attention, kept_norm2, kept_route, kept_experts))
    n, kept_norm = rmsnorm(x, params["norm"])
    return n @ params["embedding"].T, sum(balances) / L, loads, (kept, kept_norm, n)


def backward(params, tokens, d_logits, kept):
    """The gradients of all parameters: the lines of `forward` from the last to the first, each by its adjoint."""
    kept, kept_norm, n = kept
    d = {name: np.zeros_like(array) for name, array in params.items()}
    d["embedding"] += matrix_gradient(d_logits, n)  # as the head; as the table it gets more below
    d_x, d["norm"][:] = rmsnorm_backward(d_logits @ params["embedding"], kept_norm)
    for i in reversed(range(L)):
        kept_norm1, kept_attention, kept_norm2, kept_route, kept_experts = kept[i]
        d_n, d_g, d["w_gate"][i], d["w_in"][i], d["w_out"][i] = experts_backward(d_x, kept_experts)
        d_n_route, d["router"][i] = route_backward(d_g, BALANCE / L, kept_route)
        d_branch, d["norm2"][i] = rmsnorm_backward(d_n + d_n_route, kept_norm2)
        d_x = d_x + d_branch  # x = x + y: the gradient of the sum goes along the stream and through the branch
        d_n, d["qkv"][i], d["out"][i] = attention_backward(d_x, kept_attention)
        d_branch, d["norm1"][i] = rmsnorm_backward(d_n, kept_norm1)
        d_x = d_x + d_branch
    np.add.at(d["embedding"], tokens, d_x)  # a row gets the gradients of all places where its token stands
    return d


def loss_and_gradients(params, tokens, targets, capacity=CAPACITY):
    """The loss of B sequences, the gradients of all parameters, and the loads f of the experts.

    Cross-entropy is -log p_target, averaged over the tokens, and d_logits = (p - onehot(target)) / (B T)."""
    logits, balance, loads, kept = forward(params, tokens, capacity)
    p = softmax(logits)
    of_target = np.take_along_axis(p, targets[..., None], -1)
    loss = -np.log(of_target).mean() + BALANCE * balance
    np.put_along_axis(p, targets[..., None], of_target - 1, -1)
    return loss, backward(params, tokens, p / targets.size, kept), loads


def adamw(params, gradients, means, squares, step):
    """Loshchilov and Hutter 2019, algorithm 2. The rate rises for 40 steps and falls to 0 along a cosine."""
    rate = RATE * min((step + 1) / 40, (1 + math.cos(math.pi * step / STEPS)) / 2)
    for name, d in gradients.items():
        means[name] = 0.9 * means[name] + 0.1 * d
        squares[name] = 0.95 * squares[name] + 0.05 * d * d
        mean, square = means[name] / (1 - 0.9 ** (step + 1)), squares[name] / (1 - 0.95 ** (step + 1))
        decay = 0 if "norm" in name else DECAY
        params[name] -= rate * (mean / (np.sqrt(square) + 1e-8) + decay * params[name])


def nats_per_character(params, tokens):
    """Cross-entropy of a text, in sequences of T, with no token dropped."""
    windows = tokens[: (len(tokens) - 1) // T * T + 1]
    p = softmax(forward(params, windows[:-1].reshape(-1, T), capacity=T)[0])
    return -np.log(np.take_along_axis(p.reshape(-1, V), windows[1:, None], -1)).mean()


def write(params, rng, start="Once upon a time", length=400, temperature=0.6):
    """Draws one character after another. Everything is computed again for each: plain, and slow."""
    tokens = [alphabet.index(character) for character in start]
    while len(tokens) < length and alphabet[tokens[-1]] != "\n":
        logits = forward(params, np.array([tokens[-T:]]), capacity=T)[0][0, -1]
        tokens.append(int(rng.choice(V, p=softmax(logits.astype(np.float64) / temperature))))
    return "".join(alphabet[token] for token in tokens)


def main():
    rng = np.random.default_rng(0)
    params = init(rng)
    means, squares = ({name: np.zeros_like(array) for name, array in params.items()} for _ in range(2))
    print(f"{len(stories):,} characters, {V} different; {sum(map(np.size, params.values())):,} parameters")
    begin = time.perf_counter()
    for step in range(STEPS):
        starts = rng.integers(0, len(train_text) - T, B)
        window = train_text[starts[:, None] + np.arange(T + 1)]
        loss, gradients, loads = loss_and_gradients(params, window[:, :-1], window[:, 1:])
        adamw(params, gradients, means, squares, step)
        if (step + 1) % 100 == 0 or step == 0:
            shares = "   ".join(" ".join(f"{100 * share:2.0f}" for share in f) for f in loads)
            print(f"step {step + 1:4}  loss {loss:.3f}  % of choices of each expert, by layer: {shares}", flush=True)
    seconds = time.perf_counter() - begin
    print(f"{seconds:.0f} s; unseen text: {nats_per_character(params, held_out):.3f} nats a character\n")
    print(write(params, rng))


if __name__ == "__main__":
    main()
