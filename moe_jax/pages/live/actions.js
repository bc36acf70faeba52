// What a person can do: write a text, write it again, go on from its end or from another token, talk, and go back.
const FORMER = 6; // most former texts that are kept
let former = []; // {name, turns, words, size}: texts that were left, newest first
let name = 1, lastName = 1; // the number of the text on the page, and the highest so far

const canGoOn = (i) => live && running === null && frame === 0 && tokens[i].id !== null && !(owners[i].before.length === 0 && i === startOf(owners[i]));
const copyOf = (turn) => ({ ...turn, box: null, tokens: [...turn.tokens] });
// Keeps the text that is about to change, and numbers the next one. `i` is the token where it changes.
const keepFormer = (i = 0, next = null) => {
  if (!tokens.length) return;
  const words = tokens.slice(Math.max(0, i - 6), i + 6).map((t) => t.piece).join("").trim();
  former = [{ name, turns: turns.map(copyOf), words, size: tokens.length }, ...former].slice(0, FORMER);
  name = next ?? ++lastName;
  drawFormer();
};
const drawFormer = () => fill(clear(byId("former")), {}, former.map((text, n) => el("li", {}, el("button", { type: "button", onclick: () => goBack(n) },
  el("b", {}, `↩ Text ${text.name}`), el("span", { class: "words" }, `… ${quoted(text.words)} …`), el("span", { class: "size" }, `${count(text.size, "token")}${drawnWith(text.turns.at(-1))}`)))));

const showTurns = (given) => {
  clearText();
  for (const old of given) {
    const turn = { ...copyOf(old), tokens: [] };
    turns.push(turn);
    later(() => turnBox(turn));
    for (const token of old.tokens) later(() => addToken(turn, token));
  }
};
const goBack = async (n) => {
  if (running) return;
  await allShown();
  const [text] = former.splice(n, 1);
  keepFormer(tokens.length, text.name);
  ({ name } = text);
  showTurns(text.turns);
  drawFormer();
  await allShown();
  drawButtons();
  tokensBox.focus();
  byId("status").textContent = `Text ${name} is back.`;
};

const COMPLETIONS = "v1/completions", CHAT = "v1/chat/completions", LOGPROBS = 5;
const newTurn = (role, more = {}) => ({ role, before: [], tokens: [], finish: null, start: 0, ...more });
const writeNew = (prompt) => {
  keepFormer(tokens.length);
  clearText();
  const turn = newTurn("text");
  turns.push(turn);
  return write(turn, COMPLETIONS, { prompt, echo: true, logprobs: LOGPROBS }, prompt);
};
// Writes on after the tokens of a turn as they stand. The echo tells the experts of the last of them; a server echoes no
// more than the context.
const writeOn = (turn, seed = turn.seed ?? chosenSeed()) => {
  const prompt = [...turn.before, ...turn.tokens.map((t) => t.id)];
  turn.start = turn.tokens.length;
  return write(turn, COMPLETIONS, { prompt, echo: prompt.length <= (model.context ?? Infinity), logprobs: LOGPROBS, seed });
};
const goOn = () => writeOn(turns.at(-1));
const goOnFrom = async (i, other) => {
  if (!canGoOn(i)) return;
  keepFormer(i);
  const turn = owners[i], { others } = tokens[i];
  cutText(i);
  addToken(turn, { ...other, others, experts: null, gates: null, given: false });
  state.held = true;
  chooseToken(i, true);
  await writeOn(turn);
};
// Takes away what the model wrote last, and writes it once more.
const rewrite = async (seed) => {
  const turn = turns.at(-1), cut = tokens.length - turn.tokens.length + turn.start;
  keepFormer(cut);
  if (cut < tokens.length) cutText(cut);
  letGo();
  await writeOn(turn, seed);
};
const again = () => {
  if (pinned()) byId("seed").value = Math.min(chosenSeed() + 1, MOST_SEED);
  return rewrite(chosenSeed());
};

// The text of tokens. Bytes that are spelled in hexadecimal are put together again; special tokens have no text.
const textOf = (written) => {
  const bytes = [], encoder = new TextEncoder();
  for (const { piece } of written) {
    if (!SPELLED.test(piece)) bytes.push(...encoder.encode(piece));
    else if (!piece.startsWith("<|")) for (const byte of piece.match(/[0-9A-F]{2}/g) ?? []) bytes.push(parseInt(byte, 16));
  }
  return new TextDecoder().decode(new Uint8Array(bytes));
};
const send = async (text) => {
  const said = newTurn("user", { text }), answer = newTurn("assistant");
  turns.push(said, answer);
  turnBox(said);
  turnBox(answer);
  followEnd();
  byId("prompt").value = "";
  const system = byId("system").value.trim(), before = system ? [{ role: "system", content: system }] : [];
  const messages = [...before, ...turns.slice(0, -1).map((turn) => ({ role: turn.role, content: turn.text ?? textOf(turn.tokens) }))];
  await write(answer, CHAT, { messages, logprobs: true, top_logprobs: LOGPROBS });
  if (answer.tokens.length || answer.finish !== "lost") return;
  turns.splice(-2).forEach((turn) => turn.box.remove());
  byId("prompt").value = text;
  drawButtons();
};
const startOver = () => {
  keepFormer(tokens.length);
  clearText();
  drawButtons();
  byId("prompt").focus();
};
// The last message comes back into the box. It and its answer leave the conversation.
const edit = () => {
  keepFormer(tokens.length);
  const said = turns.at(-2), shown = turns.slice(0, -2);
  showTurns(shown);
  drawButtons();
  byId("prompt").value = said.text;
  byId("prompt").focus();
};
const copy = async () => {
  const text = turns.map((turn) => turn.text ?? textOf(turn.tokens)).join("\n\n");
  const said = await navigator.clipboard?.writeText(text).then(() => "Copied.", () => "") ?? "";
  say(said ? "" : "The browser does not let this page copy. Select the text, and copy it.");
  byId("status").textContent = said;
  byId("copy").textContent = said ? "Copied" : "Copy";
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
};
