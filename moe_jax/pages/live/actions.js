// What a person can do: write a text, write it again, go on from its end or from another token, talk, and go back.
const FORMER = 6; // most former texts that are kept
let former = []; // {turns, parted, tokens}: texts that were left, newest first

const canGoOn = (i) => live && running === null && frame === 0 && tokens[i].id !== null && !(owners[i].before.length === 0 && i === startOf(owners[i]));
const copyOf = (turn) => ({ ...turn, box: null, tokens: [...turn.tokens] });
// Keeps the text that is about to change. `i` is the token where it changes.
const keepFormer = (i = 0) => {
  if (!tokens.length) return;
  const words = tokens.slice(Math.max(0, i - 6), i + 6).map((t) => t.piece).join("").trim();
  former = [{ turns: turns.map(copyOf), words, size: tokens.length }, ...former].slice(0, FORMER);
  drawFormer();
};
const drawFormer = () => fill(clear(byId("former")), {}, former.map((text, n) => el("li", {}, el("button", { type: "button", onclick: () => goBack(n) },
  el("b", {}, "↩ Back to the former text"), el("span", { class: "words" }, `… ${quoted(text.words)} …`), el("span", { class: "size" }, count(text.size, "token"))))));

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
  keepFormer(tokens.length);
  showTurns(text.turns);
  drawFormer();
  await allShown();
  drawButtons();
  tokensBox.focus();
  byId("status").textContent = "The former text is back.";
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
const writeOn = (turn) => {
  const prompt = [...turn.before, ...turn.tokens.map((t) => t.id)];
  turn.start = turn.tokens.length;
  return write(turn, COMPLETIONS, { prompt, echo: prompt.length <= (model.context ?? Infinity), logprobs: LOGPROBS });
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
const again = async () => {
  const turn = turns.at(-1), cut = tokens.length - turn.tokens.length + turn.start;
  byId("seed").value = settings().seed + 1;
  keepFormer(cut);
  if (cut < tokens.length) cutText(cut);
  letGo();
  await writeOn(turn);
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
  const messages = turns.slice(0, -1).map((turn) => ({ role: turn.role, content: turn.text ?? textOf(turn.tokens) }));
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
