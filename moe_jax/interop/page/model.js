// The forward pass of a sparse mixture-of-experts transformer for one token, with a cache of keys and values.
//
// Weights are float32, sums and activations are in double precision. Names and shapes are those of `moe_jax/model`:
//
//    D width   L layers   H heads of width A   KV heads of keys and values   E experts, K for each token   V vocabulary
//
// A matrix lies in memory output by output: W[output * inputs + input].

// y = W x.
const multiply = (W, x) => {
  const inputs = x.length, most = inputs - 3, y = new Float64Array(W.length / inputs);
  for (let row = 0, at = 0; row < y.length; row++) {
    let a = 0, b = 0, c = 0, d = 0, i = 0; // four sums, so that an addition does not wait for the one before it
    for (; i < most; i += 4, at += 4) {
      a += W[at] * x[i];
      b += W[at + 1] * x[i + 1];
      c += W[at + 2] * x[i + 2];
      d += W[at + 3] * x[i + 3];
    }
    for (; i < inputs; i++) a += W[at++] * x[i];
    y[row] = a + b + (c + d);
  }
  return y;
};
const add = (x, y, factor = 1) => {
  for (let i = 0; i < y.length; i++) x[i] += factor * y[i];
};
const largest = (values) => {
  let most = -Infinity;
  for (const value of values) if (value > most) most = value;
  return most;
};
const softmax = (logits) => {
  const most = largest(logits), powers = new Float64Array(logits.length);
  let total = 0;
  for (let i = 0; i < powers.length; i++) total += powers[i] = Math.exp(logits[i] - most);
  for (let i = 0; i < powers.length; i++) powers[i] /= total;
  return powers;
};

// RMSNorm or LayerNorm.
const normalise = ({ kind, eps, scale, bias }, x) => {
  const y = new Float64Array(x.length);
  let mean = 0, square = 0;
  if (kind === "layernorm") for (let i = 0; i < x.length; i++) mean += x[i] / x.length;
  for (let i = 0; i < x.length; i++) square += (x[i] - mean) * (x[i] - mean);
  const factor = 1 / Math.sqrt(square / x.length + eps);
  for (let i = 0; i < x.length; i++) y[i] = (x[i] - mean) * factor * scale[i] + (bias ? bias[i] : 0);
  return y;
};
// Queries and keys are normalised head by head, or all heads together; `scale` has the width of one part.
const normaliseHeads = (norm, x) => {
  if (!norm) return;
  for (let at = 0; at < x.length; at += norm.scale.length) {
    const part = x.subarray(at, at + norm.scale.length);
    part.set(normalise(norm, part));
  }
};
// Rotary positions: pair (i, i + A/2) of a head is rotated by position * theta^(-2i/A).
const rotate = (x, width, position, theta) => {
  const half = width / 2;
  for (let i = 0; i < half; i++) {
    const angle = position * theta ** (-i / half), cos = Math.cos(angle), sin = Math.sin(angle);
    for (let at = i; at < x.length; at += width) {
      const a = x[at], b = x[at + half];
      x[at] = a * cos - b * sin;
      x[at + half] = b * cos + a * sin;
    }
  }
};

// The K experts of a token and their gates. An expert that is off does not exist for the router: its logit is -infinity,
// so the next-best expert takes its place.
const route = (logits, { top_k: K, balancing, renormalise_gates }, bias, off) => {
  const seen = logits.map((l, e) => (off.includes(e) ? -Infinity : l)), probs = softmax(seen);
  const score = balancing === "bias" ? seen.map((l, e) => (off.includes(e) ? -Infinity : probs[e] + bias[e])) : seen;
  const order = score.map((_, e) => e).sort((a, b) => score[b] - score[a] || a - b); // of equals the lower index
  const experts = order.slice(0, K), own = experts.map((e) => seen[e]);
  return { experts, gates: renormalise_gates && K > 1 ? [...softmax(own)] : experts.map((e) => probs[e]) };
};
const SIGMOID = (x) => 1 / (1 + Math.exp(-x));
const GELU = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
// One feed-forward network: (silu(gate x) * in x), or gelu(in x), and then out.
const feed = ({ w_in, w_gate, w_out }, x) => {
  const inner = multiply(w_in, x);
  if (w_gate) multiply(w_gate, x).forEach((g, i) => { inner[i] *= g * SIGMOID(g); });
  else inner.forEach((v, i) => { inner[i] = GELU(v); });
  return multiply(w_out, inner);
};

class Model {
  // `config` is that of the run's model, `get(name)` a tensor of it or undefined.
  constructor(config, get) {
    const norm = (name, kind = config.norm) => get(`${name}.scale`) && { kind, scale: get(`${name}.scale`),
      bias: get(`${name}.bias`), eps: config.norm_eps || (kind === "layernorm" ? 1e-5 : 1e-6) };
    // The networks side by side in tensors [E, outputs, inputs].
    const networks = (name) => {
      const parts = ["w_in", "w_gate", "w_out"].filter((part) => get(`${name}.${part}`)), count = get(`${name}.w_in`)?.shape[0] ?? 0;
      const part = (tensor, e) => tensor.subarray(e * tensor.length / count, (e + 1) * tensor.length / count);
      return Array.from({ length: count }, (_, e) => Object.fromEntries(parts.map((p) => [p, part(get(`${name}.${p}`), e)])));
    };
    Object.assign(this, { config, embedding: get("embedding"), position: get("position"), norm: norm("norm") });
    this.head = config.tied_head ? this.embedding : get("head");
    this.headWidth = config.head_size || config.width / config.heads;
    this.keyWidth = (config.kv_heads || config.heads) * this.headWidth;
    this.blocks = Array.from({ length: config.layers }, (_, l) => {
      const name = `blocks.${l}`, own = (rest) => get(`${name}.${rest}`);
      return {
        attentionNorm: norm(`${name}.attention_norm`), ffnNorm: norm(`${name}.ffn_norm`),
        qkv: own("attention.qkv"), qkvBias: own("attention.qkv_bias"),
        out: own("attention.out"), outBias: own("attention.out_bias"),
        queryNorm: norm(`${name}.attention.query_norm`, "rmsnorm"), keyNorm: norm(`${name}.attention.key_norm`, "rmsnorm"),
        router: own("ffn.router"), balanceBias: own("ffn.balance_bias"),
        experts: networks(`${name}.ffn.experts`), shared: networks(`${name}.ffn.shared`),
        sharedGate: own("ffn.shared_gate"),
        keys: new Float32Array(config.seq_len * this.keyWidth), values: new Float32Array(config.seq_len * this.keyWidth),
      };
    });
  }

  attention(block, x, position) {
    const { config, headWidth: A, keyWidth } = this, queries = config.heads * A, qkv = multiply(block.qkv, x);
    if (block.qkvBias) add(qkv, block.qkvBias);
    const query = qkv.subarray(0, queries), key = qkv.subarray(queries, queries + keyWidth);
    normaliseHeads(block.queryNorm, query);
    normaliseHeads(block.keyNorm, key);
    if (config.positions === "rope") for (const z of [query, key]) rotate(z, A, position, config.rope_theta);
    block.keys.set(key, position * keyWidth);
    block.values.set(qkv.subarray(queries + keyWidth), position * keyWidth);
    const mixed = new Float64Array(queries), shared = queries / keyWidth; // heads that read the same keys and values
    for (let h = 0; h < config.heads; h++) {
      const first = Math.floor(h / shared) * A, q = query.subarray(h * A, (h + 1) * A), own = mixed.subarray(h * A, (h + 1) * A);
      const scores = new Float64Array(position + 1);
      for (let t = 0; t <= position; t++) {
        let score = 0;
        for (let i = 0, at = t * keyWidth + first; i < A; i++) score += q[i] * block.keys[at + i];
        scores[t] = score / Math.sqrt(A);
      }
      const weights = softmax(scores);
      for (let t = 0; t <= position; t++) {
        for (let i = 0, at = t * keyWidth + first; i < A; i++) own[i] += weights[t] * block.values[at + i];
      }
    }
    const y = multiply(block.out, mixed);
    if (block.outBias) add(y, block.outBias);
    return y;
  }

  // The hidden state after a token, for `logits`, and the experts and gates of each layer. `off[l]` are the experts of
  // layer l that are switched off. The tokens before `position` must have been read.
  read(token, position, off) {
    const { config } = this, D = config.width, x = new Float64Array(D), routed = { experts: [], gates: [] };
    add(x, this.embedding.subarray(token * D, (token + 1) * D), config.scaled_embedding ? Math.sqrt(D) : 1);
    if (this.position) add(x, this.position.subarray(position * D, (position + 1) * D));
    this.blocks.forEach((block, l) => {
      add(x, this.attention(block, normalise(block.attentionNorm, x), position));
      const z = normalise(block.ffnNorm, x);
      if (block.router) {
        const { experts, gates } = route([...multiply(block.router, z)], config.routing, block.balanceBias, off[l] ?? []);
        experts.forEach((e, k) => { if (gates[k]) add(x, feed(block.experts[e], z), gates[k]); });
        routed.experts.push(experts);
        routed.gates.push(gates);
      } else add(x, feed(block.experts[0], z));
      const gate = block.sharedGate ? 1 / (1 + Math.exp(-multiply(block.sharedGate, z)[0])) : 1;
      for (const network of block.shared) add(x, feed(network, z), gate);
    });
    return { hidden: normalise(this.norm, x), ...routed };
  }

  logits(hidden) { return multiply(this.head, hidden); }
}
