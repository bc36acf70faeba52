// What the model says, as a transport delivers it. Each page has one transport: the server's asks over HTTP
// (`moe_jax/serving/page`), and that of an exported page asks a worker in the page (`moe_jax/interop/page`). It has
//
//    ABOUT                        where the page gets its tokens from, for the foot of the page
//    askForEntry()                the entry of v1/models
//    events(path, body, signal)   the events of a text, as the server streams them
//    startTransport()             controls of its own
//    aside()                      what else a text is written with, in words
//
// A failure is a Trouble, whose message is the line to show.
class Trouble extends Error {
  constructor(message, needsKey = false) { super(message); this.needsKey = needsKey; }
}

// The words of another program, in one line.
const oneLine = (text) => visible(`${text ?? ""}`.replace(/\s+/g, " ").trim()).slice(0, 300);
const troubleLine = (error) => (error instanceof Trouble ? error.message : `The page failed: ${oneLine(error.message)}. Load it again.`);

// The tokens of one event. Completions have lists side by side; a conversation has one entry for each token.
const tokensOf = (choice) => {
  const said = choice.logprobs ?? {};
  return (choice.token_ids ?? []).map((id, n) => ({
    id,
    ...(said.content ? spoken(said.content[n]) : listed(said, n)),
    experts: choice.routed_experts?.[n] ?? null,
    gates: choice.gates?.[n] ?? null,
  }));
};
const spoken = (entry) => ({
  piece: entry.token,
  logprob: entry.logprob,
  others: entry.top_logprobs.filter((o) => o.logprob !== null).map((o) => ({ id: o.token_id, piece: o.token, logprob: o.logprob })),
});
// `top_logprobs` is an object, which loses the order of pieces that look like numbers. So its entries are sorted, the
// likeliest first, as `top_token_ids` are.
const listed = (said, n) => {
  const ids = said.top_token_ids?.[n] ?? [], top = Object.entries(said.top_logprobs?.[n] ?? {});
  top.sort((a, b) => (b[1] ?? -Infinity) - (a[1] ?? -Infinity));
  return {
    piece: said.tokens?.[n] ?? "",
    logprob: said.token_logprobs?.[n] ?? null,
    others: top.map(([piece, logprob], k) => ({ id: top.length === ids.length ? ids[k] : null, piece, logprob })).filter((o) => o.logprob !== null),
  };
};
