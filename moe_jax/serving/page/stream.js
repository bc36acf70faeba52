// The transport of the server's page: requests, and the events of a stream.
const ABOUT = "One file. It asks only the server that it came from.";
const aside = () => "";
const KEY = "moe-jax-key";
const GONE = "The server does not answer. See whether it still runs, start it again if not, and then press Write.";
const CUT = "The connection ended before the text did. Press Go on to write further from here.";

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

const askForEntry = async () => (await (await request("v1/models")).json()).data[0];

// A server may ask for a key. It is kept for this tab.
const startTransport = () => {
  const use = () => {
    sessionStorage.setItem(KEY, byId("key").value);
    if (connected) submit(); else connect();
  };
  byId("use-key").addEventListener("click", use);
  byId("key").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); use(); } });
};
