// The transport of a page with the model inside: a worker in the page computes the tokens.
const ABOUT = "One file with the model inside. It needs no network.";
// Weights and worker are taken out of the document at once, so that a saved text is without them.
const taken = (id) => { const node = byId(id); node?.remove(); return node?.textContent; };
const inside = { weights: taken("weights"), worker: taken("worker") };
const SPOILED = "The model in this file cannot be read. The file was changed on its way, or the browser is old: get the file once more, or open it in a current browser.";

let worker = null, texts = 0;
const answers = {}; // number of a text, or "entry" -> the function that takes the worker's messages
const askForEntry = async () => {
  let open = inside.weights;
  // A web server may have said that the file is in UTF-8. Its characters are spoiled then, but its bytes are not.
  const bytes = () => fetch(location.href).then((answer) => answer.arrayBuffer()).catch(() => { throw new Trouble(SPOILED); });
  if (document.characterSet !== "windows-1252") open = await bytes();
  await painted(); // the page, before the weights are copied
  worker = new Worker(URL.createObjectURL(new Blob([inside.worker], { type: "text/javascript" })));
  const said = await new Promise((done) => {
    worker.onmessage = ({ data }) => ("entry" in data ? done(data) : answers[data.text]?.(data));
    worker.onerror = (error) => { done({ entry: null }); for (const take of Object.values(answers)) take({ error: error.message }); };
    worker.postMessage({ open });
  });
  inside.weights = null;
  if (!said.entry) throw new Trouble(SPOILED);
  return said.entry;
};

async function* events(path, body, signal) {
  const text = ++texts, news = [];
  let wake = () => {};
  const take = (data) => { news.push(data); wake(); };
  answers[text] = take;
  signal.addEventListener("abort", () => { worker.postMessage({ stop: text }); take({ stopped: true }); });
  worker.postMessage({ write: text, body: { ...body, off: switchedOff() } });
  try {
    for (;;) {
      if (!news.length) await new Promise((done) => { wake = done; });
      const { event, done, error, stopped } = news.shift();
      if (stopped) throw new DOMException("stopped", "AbortError");
      if (error) throw new Trouble(`${oneLine(error)}.`);
      if (done) return;
      yield event;
    }
  } finally {
    delete answers[text];
  }
}
