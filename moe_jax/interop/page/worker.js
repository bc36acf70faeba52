// The worker of the page: it holds the model, and writes one text at a time.
//
//    page -> worker   {open: the text of the element `weights`, or the bytes of the whole file}
//                     {write: number of the text, body: the request, as the server gets it}, {stop: number}
//    worker -> page   {entry}, which is null if the weights cannot be read; {text: number, event}, {text, done: true},
//                     {text, error: a line}
let model, tokenizer, entry;
const context = []; // the tokens whose keys and values are in the cache, and the experts of each
let routes = [], switched = "", stopped = 0;

// Bytes stand in the file as characters of windows-1252, but for four, which are written as "=" and another byte.
const unpacked = (text) => {
  const byte = new Uint8Array(0x2123), bytes = new Uint8Array(text.length);
  [...new TextDecoder("windows-1252").decode(Uint8Array.from({ length: 256 }, (_, i) => i))].forEach((c, i) => { byte[c.charCodeAt(0)] = i; });
  let length = 0;
  for (let i = 0; i < text.length; i++) {
    const value = byte[text.charCodeAt(i)];
    bytes[length++] = value === 61 ? byte[text.charCodeAt(++i)] - 64 : value;
  }
  return bytes.subarray(0, length);
};
// The stream holds the length of a header, the header as JSON, and the tensors: see `moe_jax/interop/html.py`.
const open = async (source) => {
  let text = source;
  if (typeof source !== "string") {
    const whole = new TextDecoder("windows-1252").decode(source), begin = whole.lastIndexOf(' id="weights">') + 14;
    text = whole.slice(begin, whole.indexOf("<", begin));
  }
  const stream = new Blob([unpacked(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).arrayBuffer(), size = new Uint32Array(data, 0, 1)[0];
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size))), tensors = new Map();
  for (const [name, kind, shape, at] of header.tensors) {
    const tensor = new (kind === "int8" ? Int8Array : Float32Array)(data, 4 + size + at, shape.reduce((a, b) => a * b, 1));
    tensors.set(name, Object.assign(tensor, { shape }));
  }
  // A weight is a code times the scale of its output.
  for (const [name, codes] of tensors) {
    if (!name.endsWith(".codes")) continue;
    const matrix = name.slice(0, -".codes".length), scale = tensors.get(`${matrix}.scale`), inputs = codes.shape.at(-1);
    const weights = Float32Array.from(codes);
    for (let row = 0, at = 0; row < scale.length; row++) for (let i = 0; i < inputs; i++) weights[at++] *= scale[row];
    tensors.set(matrix, Object.assign(weights, { shape: codes.shape }));
  }
  tokenizer = new Tokenizer(header.tokenizer);
  model = new Model(header.model, (name) => tensors.get(name));
  ({ entry } = header);
};

// The log-probabilities of all tokens, and the likeliest of them.
const LIKELIEST = 5;
const logProbabilities = (logits) => {
  const most = largest(logits);
  let total = 0;
  for (let id = 0; id < logits.length; id++) total += Math.exp(logits[id] - most);
  const all = most + Math.log(total);
  for (let id = 0; id < logits.length; id++) logits[id] -= all;
  return logits;
};
const likeliest = (values, count) => {
  const best = [];
  for (let id = 0; id < values.length; id++) {
    if (best.length === count && !(values[id] > values[best[count - 1]])) continue;
    const at = best.findIndex((other) => values[id] > values[other]);
    best.splice(at < 0 ? best.length : at, 0, id);
    best.length = Math.min(best.length, count);
  }
  return best;
};
// A number in [0, 1) that depends on the seed and on the place in the text. So a text that was stopped goes on as it
// would have gone on.
const mix = (n) => {
  let h = Math.imul(n ^ (n >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
};
const uniform = (seed, place) => mix(mix(seed + 0x9e3779b9) ^ Math.imul(place + 1, 0x27d4eb2f)) / 2 ** 32;
const draw = (logprobs, temperature, number) => {
  if (!(temperature > 0)) return likeliest(logprobs, 1)[0];
  const chances = softmax(logprobs.map((l) => l / temperature));
  const found = chances.findIndex((p) => (number -= p) < 0);
  return found < 0 ? likeliest(logprobs, 1)[0] : found;
};

// Tokens with what the page shows of them, as one choice of an event. `rows` are {token, logprobs, route}.
const choiceOf = (rows, more) => {
  const say = (id, logprobs) => ({ token: tokenizer.pieces[id], token_id: id, logprob: logprobs ? logprobs[id] : null });
  const others = (logprobs) => (logprobs ? likeliest(logprobs, LIKELIEST).map((id) => say(id, logprobs)) : []);
  const routed = (part) => rows.map(({ route }) => (route[part].length ? route[part] : null));
  return {
    token_ids: rows.map(({ token }) => token),
    logprobs: { content: rows.map(({ token, logprobs }) => ({ ...say(token, logprobs), top_logprobs: others(logprobs) })) },
    routed_experts: routed("experts"), gates: routed("gates"), finish_reason: null, ...more,
  };
};
// Other messages get their turn: in particular one that stops the text.
const BREATH_MS = 12;
const channel = new MessageChannel();
let breathed = 0;
const breathe = () => (performance.now() - breathed < BREATH_MS ? null : new Promise((done) => {
  channel.port1.onmessage = () => { breathed = performance.now(); done(); };
  channel.port2.postMessage(0);
}));

// Reads the tokens of a prompt that are not in the cache. `each` is told every token, after it was read.
const reading = async (prompt, off, alive, each = () => {}) => {
  let common = 0, last = null;
  if (switched === JSON.stringify(off)) while (common < prompt.length - 1 && context[common] === prompt[common]) common++;
  switched = JSON.stringify(off);
  context.length = routes.length = common;
  for (const token of prompt.slice(common)) {
    await breathe();
    if (!alive()) return null;
    last = model.read(token, context.length, off);
    context.push(token);
    routes.push(last);
    each(token, last);
  }
  return last.hidden;
};

const write = async (number, { prompt, messages, echo, max_tokens, temperature, seed, off }) => {
  const T = model.config.seq_len, V = entry.moe_jax.vocab_size, fresh = typeof prompt === "string", alive = () => stopped < number;
  const refuse = (count) => {
    const [what, remedy] = messages ? ["conversation", "Begin a new one"] : ["beginning", "Shorten it"];
    throw new Error(`The ${what} has ${count} tokens, and the model reads ${T}. ${remedy}`);
  };
  // A long text is refused before it is cut into tokens: until that is done, no message is read.
  const size = fresh ? prompt.length : (messages ?? []).reduce((sum, { content }) => sum + content.trim().length, 0);
  if (size > T * tokenizer.longest) refuse(`more than ${T}`);
  const ids = messages ? tokenizer.conversation(messages) : fresh ? [tokenizer.separator, ...tokenizer.encode(prompt)] : prompt;
  if (messages ? ids.length >= T : fresh && ids.length > T) refuse(ids.length);
  const tell = (choice) => postMessage({ text: number, event: { choices: [choice] } });
  const after = (hidden) => logProbabilities(model.logits(hidden).subarray(0, V));
  let more = { prompt_token_ids: ids }, logprobs = null, place = ids.length;
  if (fresh && echo) context.length = 0; // so that the probability of each of its tokens is computed
  const echoed = (token, route) => {
    tell(choiceOf([{ token, logprobs, route }], more));
    more = {};
    logprobs = after(route.hidden);
  };
  const known = ids.slice(-T);
  let hidden = await reading(known, off, alive, fresh && echo ? echoed : undefined);
  if (hidden && echo && !fresh) {
    tell(choiceOf(known.map((token, i) => ({ token, logprobs: null, route: routes[i] })), more));
    more = {};
  }
  while (hidden && alive()) {
    logprobs = after(hidden);
    const token = draw(logprobs, temperature, uniform(seed, place++));
    if (token === tokenizer.separator) { tell({ finish_reason: "stop", ...more }); return; }
    // When the context is full, its later half becomes a new prompt.
    const next = context.length < T ? [...context, token] : [...context, token].slice(-(T >> 1));
    hidden = await reading(next, off, alive);
    if (!hidden) return;
    const last = place - ids.length >= max_tokens;
    tell(choiceOf([{ token, logprobs, route: routes.at(-1) }], { ...more, finish_reason: last ? "length" : null }));
    more = {};
    if (last) return;
  }
};

let work = Promise.resolve();
onmessage = ({ data }) => {
  if ("stop" in data) stopped = Math.max(stopped, data.stop);
  if ("open" in data) work = open(data.open).then(() => postMessage({ entry }), () => postMessage({ entry: null }));
  if ("write" in data) {
    const text = data.write, failed = (error) => postMessage({ text, error: error.message });
    work = work.then(() => write(text, data.body)).then(() => postMessage({ text, done: true }), failed);
  }
};
