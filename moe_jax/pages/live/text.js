// The text: chips in paragraphs, appended as the tokens come, coloured by expert or by probability.
const tokensBox = byId("tokens");
const nodes = [];      // the chip of each token
const paragraphs = []; // {node, first, count, written}: the first token, how many, whether its direction is known
let reachable = 0;     // the only token that the Tab key reaches

const colouring = () => (layersShown() ? byId("colour").value : "surprise");
const surprise = (token) => (token.logprob === null ? 0 : -token.logprob);

const dress = (i) => {
  const token = tokens[i], node = nodes[i], row = token.experts?.[state.layer], mode = colouring();
  let name = `t${node.fixed}`;
  if (row) {
    name += ` a${row[0]}${row.length > 1 ? ` b${row[1]}` : ""}`;
    const place = state.lit === null ? -1 : row.indexOf(state.lit);
    if (place >= 0) {
      const graded = row.length > 2 && token.gates?.[state.layer];
      name += place && !graded ? " lit second" : " lit";
      node.style.setProperty("--g", graded ? (graded[place] / (graded[0] || 1)).toFixed(2) : 1);
    }
    if (node.number !== row[0]) node.dataset.expert = node.number = row[0];
  }
  if (node.shown !== name) node.className = node.shown = name;
  if (mode === "surprise") node.style.setProperty("--v", surpriseShade(surprise(token)).toFixed(3));
};
const dressAll = () => {
  const mode = colouring();
  tokensBox.classList.toggle("lighting", state.lit !== null && mode === "expert");
  tokensBox.classList.toggle("shaded", mode === "surprise");
  tokensBox.classList.toggle("numbered", mode === "expert" && byId("numbers").checked);
  if (state.lit !== null) tokensBox.style.setProperty("--lit", colourOf(state.lit));
  drawLegend(mode);
  dressFrom(firstInSight(), tokens.length);
};
// A long text is dressed in parts, one in each frame, beginning with what is in sight. Of the `left` tokens from token i
// on, a part is dressed now; after the last token comes the first.
const PART = 120;
let nextPart = 0;
const dressFrom = (i, left) => {
  cancelAnimationFrame(nextPart);
  const part = Math.min(PART, left);
  for (let n = 0; n < part; n++) dress((i + n) % tokens.length);
  if (left > part) nextPart = requestAnimationFrame(() => dressFrom((i + part) % tokens.length, Math.min(left - part, tokens.length)));
};
const firstInSight = () => {
  const top = tokensBox.getBoundingClientRect().top;
  return paragraphs.find((p) => p.node.getBoundingClientRect().bottom > top)?.first ?? 0;
};
const drawLegend = (mode) => {
  const sample = (name, text) => el("span", {}, el("span", { class: `t ${name}`, "aria-hidden": "true" }, "word"), text);
  const several = model.experts_per_token > 1;
  fill(clear(byId("legend")), {}, mode === "surprise" ? [surpriseScale("the probability that the model gave to the token")] : [
    sample(`a0 b${several ? 1 : 0}`, several ? "fill: first choice; line below: second choice" : "fill: the chosen expert"),
    model.chat ? null : sample("given", "sloping: given to the model; upright: written by it"),
    el("span", {}, el("span", { class: "evenly", "aria-hidden": "true" }), `in the bars: the even share, ${percent(1 / model.experts)}`),
  ]);
};

// The element that holds the paragraphs of a turn.
const turnBox = (turn) => {
  if (turn.box) return turn.box;
  turn.box = el("div", { class: `turn ${turn.role}` });
  if (turn.role !== "text") turn.box.append(el("h3", {}, turn.role === "user" ? "You" : "The model"));
  if (turn.role === "user") turn.box.append(el("p", { class: "said", dir: directionOf([turn.text]) }, turn.text));
  tokensBox.append(turn.box);
  return turn.box;
};

const place = (i) => {
  const token = tokens[i], turn = owners[i], box = turnBox(turn);
  let last = paragraphs.at(-1);
  if (!last || last.turn !== turn || (last.count && endsParagraph(last.count, tokens[i - 1].piece, token.piece))) {
    last = { turn, node: el("p"), first: i, count: 0, known: false };
    paragraphs.push(last);
    box.append(last.node);
  }
  const spelled = SPELLED.test(token.piece), parts = tokenChip(pieceShown(token.piece), i), node = parts.at(-1);
  node.fixed = `${spelled ? " mark" : node.slim ? " slim" : ""}${token.given ? " given" : ""}`;
  nodes[i] = node;
  last.node.append(...(last.count ? parts : [node])); // no space at the beginning of a paragraph
  last.count++;
  if (!last.known && !spelled && LETTER.test(token.piece)) {
    last.known = true;
    last.node.dir = directionOf([token.piece]);
  }
  if (i === reachable) node.tabIndex = 0;
  dress(i);
};
const addToken = (turn, token) => {
  turn.tokens.push(token);
  tokens.push(token);
  owners.push(turn);
  countToken(token);
  place(tokens.length - 1);
};

// Everything from token i on is taken away, and the turns after it.
const cutText = (i) => {
  const turn = owners[i], first = startOf(turn);
  for (const token of tokens.slice(i)) countToken(token, -1);
  turns.slice(turns.indexOf(turn) + 1).forEach((later) => later.box?.remove());
  turns.length = turns.indexOf(turn) + 1;
  turn.tokens.length = i - first;
  tokens.length = owners.length = nodes.length = i;
  while (paragraphs.length && paragraphs.at(-1).first >= i) paragraphs.pop().node.remove();
  const last = paragraphs.at(-1);
  if (last && last.turn === turn && last.first + last.count > i) {
    const again = range(i - last.first).map((n) => last.first + n);
    last.count = 0;
    clear(last.node);
    for (const j of again) place(j);
  }
  reachable = Math.min(reachable, Math.max(i - 1, 0));
  if (nodes[reachable]) nodes[reachable].tabIndex = 0;
};
const clearText = () => {
  for (const turn of turns) turn.box = null;
  turns = [];
  cancelAnimationFrame(nextPart);
  tokens.length = owners.length = nodes.length = paragraphs.length = reachable = 0;
  clearCounts();
  clear(tokensBox);
  speed.written = 0;
  drawSpeed();
  letGo();
};

const chooseToken = (i, focus = false) => {
  if (i < 0 || i >= tokens.length) return;
  if (state.token !== null) nodes[state.token]?.removeAttribute("aria-current");
  if (nodes[reachable]) nodes[reachable].tabIndex = -1;
  nodes[i].tabIndex = 0;
  reachable = i;
  nodes[i].setAttribute("aria-current", "true");
  change("token", i);
  if (focus) nodes[i].focus({ preventScroll: NARROW.matches });
  if (NARROW.matches) nodes[i].scrollIntoView({ block: "nearest" }); // above the card, which covers a half
};
const letGo = () => {
  if (state.token !== null) nodes[state.token]?.removeAttribute("aria-current");
  state.held = false;
  change("token", null);
};
const setLayer = (at) => {
  const next = Math.max(0, Math.min(layersShown() - 1, at));
  byId("layer").value = next;
  byId("layer-name").textContent = `${layerName(next)} (of 0 to ${model.layers - 1})`;
  change("layer", next);
};

const walk = (event) => {
  const i = Number(event.target.dataset.i);
  if (Number.isNaN(i)) return;
  const rtl = event.target.parentElement.dir === "rtl" ? -1 : 1;
  const moves = { ArrowRight: () => i + rtl, ArrowLeft: () => i - rtl, ArrowDown: () => vertical(nodes, i, 1), ArrowUp: () => vertical(nodes, i, -1), Home: () => 0, End: () => tokens.length - 1 };
  if (event.key === "Enter" || event.key === " ") {
    state.held = true;
    chooseToken(i);
    enterCard();
  } else if (moves[event.key]) chooseToken(moves[event.key](), true);
  else return;
  event.preventDefault();
};

const startText = () => {
  byId("layer").max = Math.max(layersShown() - 1, 0);
  byId("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
  byId("colour").addEventListener("change", dressAll);
  byId("numbers").addEventListener("change", dressAll);
  listeners.push((what) => { if (what === "layer" || what === "lit") dressAll(); });
  const tokenOf = (event) => { const t = event.target.closest(".t[data-i]"); return t ? Number(t.dataset.i) : null; };
  // Pointing shows a card, unless it would cover the text. Pressing holds it, so that the way to the card may lead over
  // other tokens.
  tokensBox.addEventListener("pointerover", (event) => { const i = tokenOf(event); if (i !== null && event.pointerType === "mouse" && !state.held && !NARROW.matches) chooseToken(i); });
  // Without this the focus opens the card, which moves the token away before the click.
  tokensBox.addEventListener("mousedown", (event) => { if (NARROW.matches && tokenOf(event) !== null) event.preventDefault(); });
  tokensBox.addEventListener("click", (event) => { const i = tokenOf(event); if (i !== null) { state.held = true; chooseToken(i, true); } else letGo(); });
  tokensBox.addEventListener("focusin", (event) => { const i = tokenOf(event); if (i !== null && i !== state.token) chooseToken(i); });
  tokensBox.addEventListener("keydown", walk);
  // On a narrow window the card lies over the page, so it goes where the text goes.
  new IntersectionObserver(([box]) => { if (NARROW.matches && !box.isIntersecting && state.token !== null) letGo(); }).observe(tokensBox);
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("select, textarea, input:not([type=range], [type=checkbox])")) return;
    if (event.key === "[") setLayer(state.layer - 1);
    if (event.key === "]") setLayer(state.layer + 1);
    if (event.key === "Escape") {
      state.held = false;
      if (byId("card").contains(document.activeElement)) { nodes[state.token].focus(); return; }
      letGo();
      if (state.lit !== null) change("lit", null);
    }
  });
};
