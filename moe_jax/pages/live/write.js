// Writing: what is asked of the server, and how its tokens come onto the page, some in every frame.
const FRAME_MS = 6, FRAME_TOKENS = 64; // most time and most new tokens of a frame: the browser has to lay them out, too
const DRAWN_MS = 200; // between two drawings of what sums the text up: bars, barcode, speed
const PAINT_MS = 100; // longest wait for the first token to be painted: a page out of sight is not painted

const drained = []; // called when all that waits is on the page
let running = null; // the AbortController of the request
let waiting = [], frame = 0, drawnAt = 0;
const speed = { begin: 0, first: 0, written: 0 };

// The newest token stays in sight until the reader scrolls up, and again from when the reader scrolls to the end.
let following = true, scrolledTo = 0;
tokensBox.addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = tokensBox;
  if (scrollHeight - clientHeight - scrollTop < 40) following = true;
  else if (scrollTop < scrolledTo) following = false;
  scrolledTo = scrollTop;
}, { passive: true });
const followEnd = () => { if (following) tokensBox.scrollTop = tokensBox.scrollHeight; };
const drawSums = () => {
  drawLoads();
  drawBarcode();
  drawSpeed();
  drawnAt = performance.now();
};
const flush = () => {
  const until = performance.now() + FRAME_MS;
  let next = 0;
  while (next < Math.min(waiting.length, FRAME_TOKENS) && performance.now() < until) waiting[next++]();
  waiting = waiting.slice(next);
  followEnd();
  if ((!waiting.length && !running) || performance.now() - drawnAt > DRAWN_MS) drawSums();
  frame = waiting.length ? requestAnimationFrame(flush) : 0;
  if (!frame) for (const done of drained.splice(0)) done();
};
const later = (task) => {
  waiting.push(task);
  frame ||= requestAnimationFrame(flush);
};
// Called after `later`: the next frame, with that token in it, has been painted.
const painted = () => new Promise((done) => {
  requestAnimationFrame(() => setTimeout(done));
  setTimeout(done, PAINT_MS);
});
const allShown = () => (frame ? new Promise((done) => { drained.push(done); }) : Promise.resolve());

// What a text was drawn with, so that it can be written again.
const drawnWith = (turn) => (turn?.seed === undefined ? "" : `${turn.temperature > 0 ? ` · seed ${turn.seed}` : ""}${turn.aside ? ` · ${turn.aside}` : ""}`);
const drawSpeed = () => {
  if (!speed.written) { byId("speed").textContent = ""; return; }
  const seconds = ((running ? performance.now() : speed.end) - speed.first) / 1000;
  byId("speed").textContent = `${count(speed.written, "token")} written${speed.written > 1 && seconds > 0.05 ? `, ${whole(Math.round((speed.written - 1) / seconds))} a second` : ""}; the first after ${whole(Math.round(speed.first - speed.begin))} ms${drawnWith(turns.at(-1))}`;
};

const number = (id, low, high) => {
  const field = byId(id), value = Math.min(high, Math.max(low, Number(field.value) || 0));
  field.value = value;
  return value;
};
const settings = () => ({ max_tokens: Math.round(number("length", 1, model.max_tokens ?? 100000)), temperature: number("temperature", 0, 2) });
// Each text has a seed of its own, unless the reader has entered one.
const MOST_SEED = 2 ** 31 - 1;
const pinned = () => byId("seed").value !== "";
const chosenSeed = () => (pinned() ? Math.round(number("seed", 0, MOST_SEED)) : Math.floor(Math.random() * 100000));

// Takes the events of a stream: tokens that the model wrote are added to `turn`. With `echo` the stream begins with what
// the model read. Of a fresh text (`prompt` is what was typed) this is added too, but for a separator at the beginning.
const receiver = (turn, echo, prompt) => {
  let read = null, at = 0, hidden = 0;
  const begin = (choice, first) => {
    read = choice.prompt_token_ids ?? [];
    hidden = prompt !== null && first && !prompt.startsWith(first.piece) ? 1 : 0;
    if (!echo) turn.before = read;
    else if (prompt !== null) turn.before = read.slice(0, hidden);
  };
  return (choice) => {
    const found = tokensOf(choice);
    if (read === null) begin(choice, found[0]);
    for (const token of found) {
      const given = echo && at < read.length;
      if (!given) {
        speed.first ||= performance.now();
        later(() => { speed.written++; addToken(turn, { ...token, given }); });
      } else if (prompt !== null && at >= hidden) later(() => { addToken(turn, { ...token, given }); turn.start = turn.tokens.length; });
      else if (prompt === null && at === read.length - 1) later(() => learn(turn, token));
      at++;
    }
    turn.finish = choice.finish_reason ?? turn.finish;
  };
};
// The experts of the last token of a text are known only when the text goes on.
const learn = (turn, token) => {
  const i = startOf(turn) + turn.tokens.length - 1, old = tokens[i];
  if (!old || old.experts || old.id !== token.id) return;
  Object.assign(old, { experts: token.experts, gates: token.gates });
  countToken(old);
  dress(i);
};

const show = (id, yes) => { byId(id).hidden = !yes; };
// In a conversation the button is called Send.
const say = (message) => {
  byId("error").textContent = model.chat ? message.replaceAll("ress Write", "ress Send") : message;
  show("error", message !== "");
};
const drawButtons = () => {
  const some = tokens.length > 0, quiet = running === null;
  byId("write").textContent = quiet ? (model.chat ? "Send" : "Write") : "Stop";
  show("again", some && quiet && byId("temperature").value > 0);
  show("go-on", some && quiet && turns.at(-1).finish !== "stop");
  show("edit", model.chat && turns.length > 1 && quiet);
  for (const id of ["fresh", "copy"]) show(id, turns.length > 0 && quiet);
  byId("save").disabled = !some || !quiet;
  tokensBox.classList.toggle("writing", !quiet);
  document.body.classList.toggle("begun", turns.length > 0);
};

const ENDS = { stop: "the model ended the text", length: "the text reached its length", halted: "you stopped it" };
// Sends a request and shows its tokens as a part of `turn`. Returns when all of them are on the page.
const write = async (turn, path, body, prompt = null) => {
  const asked = { seed: chosenSeed(), stream: true, return_token_ids: true, routed_experts: layersShown() > 0, ...settings(), ...body };
  Object.assign(turn, { seed: asked.seed, temperature: asked.temperature, aside: aside() });
  running = new AbortController();
  Object.assign(speed, { begin: performance.now(), first: 0, written: 0, end: 0 });
  say("");
  show("key-row", false);
  byId("status").textContent = "";
  drawButtons();
  following = true;
  const box = tokensBox.getBoundingClientRect();
  if (box.top > 0.5 * innerHeight || box.bottom < 0.3 * innerHeight) tokensBox.parentElement.scrollIntoView();
  const take = receiver(turn, body.echo === true, prompt);
  let wrong = "";
  turn.finish = null;
  try {
    let awaited = true; // no token yet. The first one is painted before more is read, which can keep the browser busy.
    for await (const event of events(path, asked, running.signal)) {
      for (const choice of event.choices ?? []) take(choice);
      if (awaited && speed.first) {
        awaited = false;
        await painted();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "halted";
    else {
      turn.finish = "lost";
      wrong = troubleLine(error);
      if (!turn.tokens.length) wrong = wrong.replace(/ress Go on( to write further from here)?/, "ress Write again"); // Go on is hidden
      show("key-row", error.needsKey === true);
    }
  }
  speed.end = performance.now();
  await allShown();
  running = null;
  drawSums();
  drawButtons();
  drawCard();
  say(wrong);
  if (!wrong) byId("status").textContent = `Finished: ${count(speed.written, "token")}, ${ENDS[turn.finish] ?? "the text ended"}.`;
};
