// Requests to the server, and the events of a stream. A failure is a Trouble, whose message is the line to show.
class Trouble extends Error {
  constructor(message, needsKey = false) { super(message); this.needsKey = needsKey; }
}
const KEY = "moe-jax-key";
const GONE = "The server does not answer. See whether it still runs, start it again if not, and then press Write.";
const CUT = "The connection ended before the text did. Press Go on to write further from here.";

// What the server said is shown as its own words, in one line.
const oneLine = (text) => visible(`${text ?? ""}`.replace(/\s+/g, " ").trim()).slice(0, 300);
const troubleOf = (status, error = {}) => {
  const said = oneLine(error.message);
  if (status === 401) return new Trouble(sessionStorage.getItem(KEY) ? "The server does not accept this key. Compare it with the one that the server was started with (--api-key), and enter it again." : "This server asks for a key. Enter the one that it was started with (--api-key).", true);
  if (status === 429 || status === 503 && !/stop|shut/i.test(`${said} ${error.code} ${error.type}`)) return new Trouble(`The server is busy and its queue is full. Wait a little, then press Write again.`);
  if (status === 503) return new Trouble("The server is being stopped. Start it again, then press Write.");
  if (status >= 500) return new Trouble(`The server failed${said ? `: ${said}` : ""}. Its terminal says more. Press Write to try again.`);
  return new Trouble(`The server refused this: ${said || `status ${status}`}`);
};

// The stream has begun, so what has come stays.
const lostBecause = (error) => {
  if (error.code === "stopping") return new Trouble("The server is being stopped. Start it again, then press Go on.");
  return new Trouble(`The server ended the text: ${oneLine(error.message) || "it did not say why"}. Press Go on to write further from here.`);
};

const request = async (path, options = {}) => {
  const headers = { "Content-Type": "application/json" }, key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Trouble(GONE);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw troubleOf(answer.status, body.error);
};

// The JSON objects of a stream of server-sent events, until `data: [DONE]`. Many may come at once. So after READ_MS of
// reading the browser gets its turn.
const READ_MS = 8;
async function* events(path, body, signal) {
  const answer = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", until = performance.now() + READ_MS;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Trouble(CUT);
    }
    if (part.done) throw new Trouble(CUT);
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      if (performance.now() > until) {
        await new Promise((done) => { setTimeout(done); });
        until = performance.now() + READ_MS;
      }
      const text = line.slice(5).trim();
      if (text === "[DONE]") { reader.cancel().catch(() => {}); return; }
      const event = JSON.parse(text);
      if (event.error) throw lostBecause(event.error);
      yield event;
    }
  }
}

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
