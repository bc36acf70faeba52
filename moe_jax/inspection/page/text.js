// The text, coloured by expert; the panel of the chosen token; all layers at a glance.
const tokensBox = byId("tokens"), card = byId("card"), barcode = byId("barcode");
const nodes = [];
const marks = new Set(data.text.mark); // separators and parts of characters, which are not shown as their own text
let reachable = 0; // the only token that the Tab key reaches

const direction = (paragraph) => directionOf(paragraph.filter((i) => !marks.has(i)).map((i) => data.text.pieces[i]));

const paragraphs = () => {
  const found = [[]], { pieces, ids } = data.text;
  const separator = marks.has(0) ? ids[0] : null;
  pieces.forEach((piece, i) => {
    const now = found.at(-1);
    if (now.length && (ids[i] === separator || endsParagraph(now.length, pieces[i - 1], piece))) found.push([]);
    found.at(-1).push(i);
  });
  return found.filter((p) => p.length);
};
const buildTokens = () => {
  const boxes = paragraphs().map((p) => el("p", { dir: direction(p) }, p.flatMap((i) => {
    const parts = tokenChip(data.text.pieces[i], i);
    nodes[i] = parts.at(-1);
    nodes[i].fixed = marks.has(i) ? " mark" : parts.at(-1).slim ? " slim" : "";
    return parts;
  })));
  tokensBox.append(...boxes);
  nodes[0].tabIndex = 0;
};

const surprise = (i) => (i === 0 ? 0 : data.text.loss[i - 1] ?? 0);
// Whether the model predicts the text worse than a guess that takes all tokens of its vocabulary as equally likely.
const meanLoss = sum(data.text.loss) / Math.max(N - 1, 1), guessLoss = Math.log(model.vocab_size), lost = meanLoss > guessLoss;
const lostSaid = `The model predicts this text worse than guessing: its loss is ${meanLoss.toFixed(2)} nats a token, and ${guessLoss.toFixed(2)} if all ${whole(model.vocab_size)} tokens of its vocabulary are equally likely. ` +
  "It has not learned this kind of text, so what its experts do here says little about them. Try a text like those that it was trained on.";
const doubt = (layer, i) => {
  let bits = 0;
  for (let e = 0; e < E; e++) { const p = probability(layer, i, e); if (p > 0) bits -= p * Math.log(p); }
  return E > 1 ? bits / Math.log(E) : 0;
};

const shadeOf = { doubt: (value) => value, surprise: surpriseShade };
// An indecision of h is that of an even choice among E^h experts.
const alike = (h) => (E ** h).toFixed(1);

const colourTokens = () => {
  const layer = state.layer, lit = state.lit, mode = byId("colour").value;
  tokensBox.classList.toggle("lighting", lit !== null && mode === "expert");
  tokensBox.classList.toggle("shaded", mode !== "expert");
  tokensBox.classList.toggle("numbered", byId("numbers").checked);
  if (lit !== null) tokensBox.style.setProperty("--lit", colourOf(lit));
  const { expert, keep, gate } = data.routing;
  const reset = mode === "expert" ? (node) => node.style.length && node.style.removeProperty("--v")
    : (node, i) => node.style.setProperty("--v", shadeOf[mode](mode === "doubt" ? doubt(layer, i) : surprise(i)).toFixed(3));
  for (let i = 0; i < N; i++) {
    const node = nodes[i], at = i * K;
    let name = `t a${expert[layer][at]}${node.fixed}`, kept = keep[layer][at];
    if (!kept) name += " da";
    if (K > 1) {
      name += ` b${expert[layer][at + 1]}`;
      if (!keep[layer][at + 1]) name += " db";
    }
    let place = lit === expert[layer][at] ? 0 : -1;
    for (let k = 1; k < K; k++) {
      kept += keep[layer][at + k];
      if (lit === expert[layer][at + k]) place = k;
    }
    if (!kept) name += " gone";
    if (place >= 0) {
      name += place && K < 3 ? " lit second" : " lit";
      if (K > 2) node.style.setProperty("--g", (gate[layer][at + place] / (gate[layer][at] || 1)).toFixed(2));
    }
    if (node.shown !== name) node.className = node.shown = name;
    if (node.number !== expert[layer][at]) node.dataset.expert = node.number = expert[layer][at];
    reset(node, i);
  }
  describeText();
};

const litSaid = () => {
  const { expert } = data.routing, e = state.lit, n = range(N).filter((i) => range(K).some((k) => expert[state.layer][i * K + k] === e)).length;
  return `the ${count(n, "token")} that chose expert ${e} ${n === 1 ? "is" : "are"} lit up${K > 2 ? ", the stronger the larger its gate beside that of the first choice" : ""}. The numbers are those of the first choices. `;
};
const describeText = () => {
  const keep = data.routing.keep[state.layer], mode = byId("colour").value;
  const dropped = keep.length - sum(keep);
  byId("text-explain").textContent = mode === "surprise"
    ? `${data.text.source}: the stronger the shade, the less the model expected the token. This does not depend on the layer.`
    : mode === "doubt" ? `${data.text.source}, layer ${state.layer} (of 0 to ${L - 1}): the stronger the shade, the less certain the router was which expert to choose.`
    : `${data.text.source}, as layer ${state.layer} (of 0 to ${L - 1}) routes it: ${state.lit === null ? "each token has the colour and the number of the expert that it chose first. " : litSaid()}` +
    (model.dropless ? "Nothing is dropped here: this run's dispatch has no capacity." :
      `${dropped ? `${whole(dropped)} of ${whole(keep.length)} choices (${percent(dropped / keep.length)}) found their expert full and were dropped.` : "No choice was dropped."}`);
  drawKey(mode);
};

// The legend says what the colours mean now.
const drawKey = (mode) => {
  const sample = (name, text) => el("span", {}, el("span", { class: `t a0 b${Math.min(1, E - 1)} ${name}`, "aria-hidden": "true" }, "word"), text);
  const shades = (values, name, note) => heatScale(values, (v) => ({ "--v": shadeOf[mode](v), "--c": "var(--accent)" }), name, note);
  fill(clear(byId("key")), {}, mode === "surprise" ? [
    surpriseScale("the chance that the model gave to the token"),
  ] : mode === "doubt" ? [
    shades([0, 0.25, 0.5, 0.75, 1], (v) => `${v}`, `0: certain of one expert. 1: all ${E} experts alike. 0.5: like an even choice among ${alike(0.5)} of them.`),
  ] : state.lit !== null ? [] : [
    sample("", K > 1 ? "fill: first choice; line below: second choice" : "fill: the chosen expert"),
    model.dropless ? null : sample("da", K > 1 ? "hatched: first choice dropped" : "hatched: dropped"),
    model.dropless || K < 2 ? null : sample("db", "dotted: second choice dropped"),
    model.dropless ? null : sample("da db gone", "struck through: all choices dropped, no chosen expert computes the token"),
  ]);
};

const ordinal = (n) => {
  const tail = n % 100 > 10 && n % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[n % 10] ?? "th";
  return `${whole(n)}${tail}`;
};

const choiceItem = (layer, i, k) => {
  const c = choice(layer, i, k);
  const place = c.kept
    ? (model.dropless ? null : `slot ${c.slot + 1} of ${model.capacity}`)
    : `dropped: it came ${ordinal(c.slot + 1)} in this window, and expert ${c.expert} has ${count(model.capacity, "slot")}`;
  return el("li", { class: "choice", vars: { "--c": colourOf(c.expert) } },
    el("b", {}, el("span", {}, `Expert ${c.expert}`), el("span", {}, `gate ${c.gate.toFixed(3)}`)),
    place && el("span", { class: c.kept ? "" : "drop" }, place));
};

// The likeliest tokens after token i. The one that follows in the text is marked.
const nextTokens = (i) => {
  if (i === N - 1) return [];
  const { words, index, permille, width } = data.text.next, at = range(width).map((n) => i * width + n).filter((n) => index[n] >= 0);
  const found = at.map((n) => [words[index[n]], permille[n] / 1000]), real = data.text.pieces[i + 1];
  return [el("p", { class: "small" }, `The ${found.length} likeliest next tokens${found.some(([word]) => word === real) ? "; the text goes on with the bold one" : ""}`),
    el("div", { class: "bars next" }, found.flatMap(([word, p]) => {
      const name = word === real ? "picked" : "";
      return [el("span", { class: name }, quoted(word)), el("span", { class: "track" }, el("div", { class: "bar", vars: { "--c": "var(--accent)", width: `${100 * p}%`, opacity: name ? 1 : 0.45 } })), el("span", { class: name }, percent(p))];
    }))];
};

const drawCard = () => {
  const i = state.token, layer = state.layer;
  clear(card);
  card.classList.toggle("open", i !== null);
  if (i === null) {
    card.append(el("p", { class: "small" }, "Point at a token, or move to it with the arrow keys. This panel then says which experts it chose, how sure the router was, and whether the experts had free slots."));
    return;
  }
  const picked = new Set(range(K).map((k) => choice(layer, i, k).expert));
  const seen = surprise(i), inWindow = i % model.seq_len;
  // Of many experts the chosen ones are shown, and a few others that were the next likeliest.
  const likely = MANY ? range(E).sort((a, b) => picked.has(b) - picked.has(a) || probability(layer, i, b) - probability(layer, i, a)).slice(0, K + 4) : range(E);
  const top = Math.max(...likely.map((e) => probability(layer, i, e)), 1e-9);
  fill(card, {}, [
    el("button", { class: "close", type: "button", "aria-label": "Close", onclick: () => {
      const node = nodes[i];
      letGo();
      node?.focus({ preventScroll: true }); // the focused button is gone
      letGo(); // the focus has chosen the token again
    } }, "×"),
    el("h3", {}, quoted(data.text.pieces[i].trim() || data.text.pieces[i])),
    el("p", { class: "where" }, `token ${whole(i + 1)} of ${whole(N)}, place ${inWindow + 1} of window ${Math.floor(i / model.seq_len) + 1}` +
      (i ? `; the model gave it a chance of ${percent(Math.exp(-seen), seen > 4 ? 2 : 0)}` : "")),
    el("ol", {}, range(K).map((k) => choiceItem(layer, i, k))),
    el("p", { class: "small" }, `Its path through all layers. ${K > 1 ? `Strong: its ${K} choices` : "Strong: its choice"}; grey: how likely the others were.`),
    pathMap(i),
    el("p", { class: "small" }, `The router's probabilities in layer ${layer} (indecision ${doubt(layer, i).toFixed(2)})`),
    el("div", { class: "bars" }, likely.flatMap((e) => {
      const p = probability(layer, i, e), name = picked.has(e) ? "picked" : "";
      return [el("span", { class: name }, `${e}`),
        el("span", { class: "track" }, el("div", { class: "bar", vars: { "--c": colourOf(e), width: `${100 * p / top}%`, opacity: picked.has(e) ? 1 : 0.45 } })),
        el("span", { class: name }, p.toFixed(3))];
    })),
    nextTokens(i),
  ]);
};
const pathMap = (i) => {
  const [accent, soft] = paletteOf("--accent", "--soft"), of = range(L).map((l) => range(K).map((k) => choice(l, i, k)));
  const tops = of.map((row, l) => Math.max(...row.map((c) => probability(l, i, c.expert)), 1e-9)), at = (l, e) => of[l].find((c) => c.expert === e);
  return expertMap({ label: "The token's choices in every layer", side: Math.max(9, Math.min(16, 200 / L)), at: [state.layer, of[state.layer][0].expert], pressed: "goes to the layer",
    paint: (l, e) => { const p = probability(l, i, e) / tops[l]; return at(l, e) ? [MANY ? accent : expertColour(e), 0.4 + 0.6 * Math.min(1, p)] : [soft, 0.45 * Math.min(1, p)]; },
    say: (l, e) => { const c = at(l, e); return `Layer ${l}, expert ${e}: probability ${probability(l, i, e).toFixed(3)}${c ? `, gate ${c.gate.toFixed(3)}${c.kept ? "" : ", dropped"}` : ""}`; },
    press: (l) => {
      setLayer(l);
      card.querySelector("canvas")?.focus({ preventScroll: true }); // a new one in its place
    } });
};

const barcodeRow = Math.max(12, Math.min(26, 160 / L));
const drawBarcode = () => {
  const width = Math.max(barcode.clientWidth, 100), scale = devicePixelRatio || 1;
  barcode.style.height = `${barcodeRow * L}px`;
  barcode.width = width * scale;
  barcode.height = barcodeRow * L * scale;
  const paint = barcode.getContext("2d");
  paint.scale(scale, scale);
  const colours = range(E).map(expertColour), step = width / N, { lit } = state;
  data.routing.expert.forEach((experts, l) => {
    for (let i = 0; i < N; i++) {
      let e = experts[i * K], strength = 1;
      if (lit !== null) {
        const k = experts.slice(i * K, i * K + K).indexOf(lit);
        if (k < 0) continue;
        [e, strength] = [lit, k === 0 ? 1 : 0.45];
      }
      paint.globalAlpha = strength;
      paint.fillStyle = colours[e];
      paint.fillRect(i * step, l * barcodeRow + 1, Math.max(step, 0.7), barcodeRow - 2);
    }
  });
};
const markBarcode = () => {
  const [row, column] = [byId("barcode-layer"), byId("barcode-token")];
  row.style.height = `${100 / L}%`;
  row.style.top = `${100 * state.layer / L}%`;
  column.hidden = state.token === null;
  column.style.left = `${100 * (state.token ?? 0) / N}%`;
  column.style.width = `max(3px, ${100 / N}%)`;
};

const chooseToken = (i, focus = false) => {
  if (i < 0 || i >= N) return;
  if (state.token !== null) nodes[state.token].removeAttribute("aria-current");
  nodes[reachable].tabIndex = -1;
  nodes[i].tabIndex = 0;
  reachable = i;
  nodes[i].setAttribute("aria-current", "true");
  change("token", i);
  if (focus) nodes[i].focus({ preventScroll: NARROW.matches });
  if (!NARROW.matches) return;
  nodes[i].scrollIntoView({ block: "nearest", behavior: "instant" });
  const covered = nodes[i].getBoundingClientRect().bottom + 12 - card.getBoundingClientRect().top;
  if (covered > 0) scrollBy(0, covered); // the card lies over the foot of the window
};
const letGo = () => {
  if (state.token !== null) nodes[state.token].removeAttribute("aria-current");
  change("token", null);
  change("lit", null);
};

const setLayer = (layer) => {
  const next = Math.max(0, Math.min(L - 1, layer));
  byId("layer").value = next;
  byId("layer-name").textContent = `${next} (of 0 to ${L - 1})`;
  change("layer", next);
};

const walk = (event) => {
  const i = Number(event.target.dataset.i);
  const rtl = event.target.parentElement.dir === "rtl" ? -1 : 1;
  const moves = { ArrowRight: () => i + rtl, ArrowLeft: () => i - rtl, ArrowDown: () => vertical(nodes, i, 1), ArrowUp: () => vertical(nodes, i, -1), Home: () => 0, End: () => N - 1 };
  if (Number.isNaN(i) || !moves[event.key]) return;
  event.preventDefault();
  chooseToken(moves[event.key](), true);
};

const drawLegend = () => fill(clear(byId("legend")), {}, [
  el("span", {}, "Experts"),
  range(E).map((e) => el("button", { type: "button", vars: { "--c": colourOf(e), "--on": inkOn(e) }, "aria-pressed": String(state.lit === e), "aria-label": `Expert ${e}`, title: `Light up the tokens of expert ${e} in every layer`,
    "data-expert": e, onclick: () => change("lit", state.lit === e ? null : e) }, `${e}`)),
]);


const showLit = () => {
  const legend = byId("legend");
  for (const b of legend.querySelectorAll("button")) b.setAttribute("aria-pressed", String(Number(b.dataset.expert) === state.lit));
  if (state.lit !== null) legend.scrollTo({ left: legend.querySelector('[aria-pressed="true"]').offsetLeft - legend.offsetLeft - 80 });
};
// The expert of layer 0 that most tokens of the text chose.
const busiest = () => {
  const chosen = range(E).map(() => 0);
  for (const e of data.routing.expert[0]) chosen[e]++;
  return chosen.indexOf(Math.max(...chosen));
};
const startText = () => {
  for (const box of [byId("legend"), tokensBox]) box.classList.toggle("many", MANY);
  byId("layer").max = L - 1;
  byId("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
  buildTokens();
  listeners.push((what) => {
    if (what === "layer" || what === "lit") colourTokens();
    if (what === "lit") showLit();
    if (what === "layer" || what === "token") { drawCard(); markBarcode(); }
    if (what === "lit") requestAnimationFrame(drawBarcode);
  });
  const tokenOf = (event) => event.target.closest(".t[data-i]");
  tokensBox.addEventListener("pointerover", (event) => { const t = tokenOf(event); if (t && event.pointerType === "mouse" && !NARROW.matches && Number(t.dataset.i) !== state.token) chooseToken(Number(t.dataset.i)); });
  // Without this the focus opens the card, which moves the token away before the click.
  tokensBox.addEventListener("mousedown", (event) => { if (NARROW.matches && tokenOf(event)) event.preventDefault(); });
  tokensBox.addEventListener("click", (event) => { const t = tokenOf(event); if (t) chooseToken(Number(t.dataset.i), true); });
  tokensBox.addEventListener("focusin", (event) => { const t = tokenOf(event); if (t && Number(t.dataset.i) !== state.token) chooseToken(Number(t.dataset.i)); });
  tokensBox.addEventListener("keydown", walk);
  byId("colour").addEventListener("change", colourTokens);
  byId("numbers").addEventListener("change", colourTokens);
  barcode.addEventListener("click", (event) => {
    const box = barcode.getBoundingClientRect();
    setLayer(Math.floor((event.clientY - box.top) / box.height * L));
    chooseToken(Math.min(N - 1, Math.floor((event.clientX - box.left) / box.width * N)));
    nodes[state.token].scrollIntoView({ block: "nearest" });
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input[type=text]")) return;
    if (event.key === "[") setLayer(state.layer - 1);
    if (event.key === "]") setLayer(state.layer + 1);
    if (event.key === "Escape") letGo();
  });
  window.addEventListener("resize", drawBarcode);
  // So many colours cannot be told apart: the page begins with one expert lit up, the clearest specialist if there is one.
  const [layer, e] = MANY ? clearest(1)[0] ?? [0, busiest()] : [0, null];
  state.lit = e;
  drawLegend();
  roving(byId("legend"), "button");
  setLayer(layer);
  showLit();
  requestAnimationFrame(drawBarcode);
};
