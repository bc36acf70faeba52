// Attention of the chosen token and of the whole text.
const drawAttention = () => {
  const box = clear(byId("attention-figure")), { attention } = data;
  const i = state.token ?? Math.min(attention.tokens - 1, model.seq_len - 1, 24);
  if (i >= attention.tokens) {
    box.append(el("p", { class: "small" }, `The page holds attention weights only for the first ${whole(attention.tokens)} tokens of a text. Choose one of them.`));
    return;
  }
  const title = el("p", {}, "In layer ", el("b", {}, `${state.layer}`), ", ", el("b", { class: "quote" }, `“${quoted(data.text.pieces[i])}”`), ` (token ${whole(i + 1)}) looks at:`);
  const heads = range(attention.heads).map((h) => {
    const flat = attention.weights[state.layer][h][i], shown = [];
    for (let n = 0; n < flat.length; n += 2) shown.push([i - flat[n], flat[n + 1]]);
    const rest = 100 - sum(shown.map(([, w]) => w));
    return el("article", { class: "head" }, el("h4", {}, `Head ${h}`), el("ul", {}, shown.map(([j, w]) =>
      el("li", { title: `token ${j + 1}` }, el("span", {}, j === i ? el("i", {}, "itself") : context(j)), el("div", { class: "bar", vars: { width: `${w}%` } }), el("span", {}, `${w} %`)))),
    rest > 1 ? el("p", { class: "small" }, `${Math.round(rest)} % elsewhere`) : null);
  });
  box.append(title, el("div", { class: "heads" }, heads));
};
// A token that is read, with the token before it as context.
const context = (j) => [j > 0 && j % model.seq_len ? quoted(data.text.pieces[j - 1]).replaceAll("␣", " ").trimStart() : "", el("b", {}, quoted(data.text.pieces[j]).replaceAll("␣", " "))];

// For each head a picture of all its kept weights: a row is a query token, a column is a key token.
const drawHeads = () => {
  const { attention } = data, n = attention.tokens, ink = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  fill(clear(byId("heads")), {}, range(attention.heads).map((h) => {
    const side = Math.min(n, 512), unit = side / n, rows = attention.weights[state.layer][h];
    const canvas = el("canvas", { role: "img", "aria-label": `Weights of head ${h}`, onclick: (event) => {
      const box = canvas.getBoundingClientRect();
      chooseToken(Math.max(0, Math.min(n - 1, Math.floor((event.clientY - box.top) / box.height * n))));
    } });
    canvas.width = canvas.height = side;
    const pen = canvas.getContext("2d");
    pen.fillStyle = ink;
    let near = 0, self = 0, kept = 0;
    rows.forEach((flat, i) => {
      for (let k = 0; k < flat.length; k += 2) {
        const [back, weight] = [flat[k], flat[k + 1] / 100];
        kept += weight; near += weight * back;
        if (!back) self += weight;
        pen.globalAlpha = Math.min(1, 0.3 + 1.5 * weight);
        pen.fillRect((i - back) * unit, i * unit, Math.max(unit, 2.5), Math.max(unit, 2.5));
      }
    });
    return el("figure", { class: "head" }, caption(`Head ${h}`, `${percent(self / n, 0)} on the token itself; ${(near / Math.max(kept, 1e-9)).toFixed(0)} tokens back on average`), canvas);
  }));
};

const startInside = () => {
  section("attention", drawAttention, ["layer", "token"]);
  section("heads", drawHeads, ["layer", "theme"]);
};

const drawHeader = () => {
  const r = data.run, text = data.routing, all = sum(text.keep.map((k) => k.length)), dropped = all - sum(text.keep.map(sum));
  byId("run-name").textContent = `· ${r.name}, step ${whole(r.step)}`;
  byId("lead").textContent = `A language model of ${L} layers reads a text. In each layer a router sends every token to ${K} of ${E} experts. This page shows each of these decisions: which expert got which token, ${model.dropless ? "" : "what found no room, "}and which tokens each expert prefers.`;
  byId("found").classList.toggle("bad", lost);
  if (lost) byId("found").append(el("p", { id: "lost-said" }, lostSaid));
  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)));
  const undecided = corpus ? sum(corpus.entropy) / L : 0;
  fill(byId("facts"), {}, [
    fact("Text", count(N, "token"), `${data.text.source.toLowerCase()}; ${count(L * K * N, "decision")}`),
    fact("Model", `${(r.params_total / 1e6).toFixed(1)} M`, `parameters; ${(r.params_active / 1e6).toFixed(1)} M of them are used for one token`),
    r.val_bits_per_byte === null ? null : fact("Bits per byte", r.val_bits_per_byte.toFixed(3), `on the ${r.val_stream === "subset" ? "validation subset" : "whole validation text"}${r.val_drop_fraction === 0 ? ", where nothing is dropped" : ""}${r.floor === null ? "" : `; ${r.floor.toFixed(3)} is the entropy of the whole text`}`),
    model.dropless ? fact("Dropped", "none", "this dispatch has no capacity") : fact("Dropped here", percent(dropped / all), `of all choices, in all layers, with the ${model.capacity} slots that an expert has in training`),
    corpus ? fact("Router's indecision", undecided.toFixed(2), `0 is certain, 1 finds all experts alike; ${undecided.toFixed(2)} is like an even choice among ${alike(undecided)} of ${E}`) : null,
  ]);
};
