// Attention of the chosen token and of the whole text, and the compiled layer.
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

const drawCompiled = () => {
  const c = data.compiled, box = clear(byId("compiled-figure"));
  const giga = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} G` : `${(n / 1e6).toFixed(2)} M`);
  const begin = `One MoE layer, forward, for one window of ${whole(model.seq_len)} tokens, compiled for ${c.platform}`;
  // The bound of the products: the slots of the capacity, or without a capacity the rows of all choices.
  const needs = model.dropless ? `the active rows, ${count(model.seq_len * K, "choice")} of the window's tokens, need` : "filling exactly the slots needs";
  const over = model.dropless ? "; the excess is the padding of the blocks" : "";
  byId("compiled-explain").textContent = !c.dots.length
    ? `${begin}. The compiler hands the matrix products to a library here, so the program does not list them; ${needs} ${giga(c.bound)} operations of them.`
    : `${begin}: every matrix product in the optimised program. ` +
    `The experts' products cost ${giga(c.expert_flops)} operations; ${needs} ${giga(c.bound)} (ratio ${(c.expert_flops / c.bound).toFixed(3)}${over}), and running every expert on every token would need ${giga(c.dense)}.`;
  const rows = c.dots.map((d) => el("tr", {}, el("td", {}, el("code", {}, d.shapes)), el("td", { class: "num" }, d.runs > 1 ? `${giga(d.flops)} (${d.runs} times)` : giga(d.flops)), el("td", { class: "num" }, percent(d.flops / c.total)), el("td", {}, el("code", {}, d.source))));
  const costs = [[`Needed: the ${model.dropless ? "active rows" : "slots, filled"}`, c.bound, true], ["Compiled: the experts", c.expert_flops], ["Compiled: the whole layer", c.total], ["All experts on all tokens", c.dense, true]];
  const most = Math.max(...costs.map(([, n]) => n));
  const tally = (title, counts) => el("p", { class: "small" }, el("b", {}, `${title}: `), Object.entries(counts).map(([name, n]) => `${n} ${name}`).join(", "), ".");
  box.append(!rows.length ? "" : el("div", { class: "costs", id: "costs" }, costs.map(([name, n, bound]) => el("div", {}, el("span", {}, name),
    el("span", {}, giga(n)), el("span", { class: "track" }, el("span", { class: bound ? "bar bound" : "bar", vars: { width: `${100 * n / most}%` } }))))),
    !rows.length ? "" : el("div", { class: "scroll" }, el("table", { id: "dots" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Matrix product (left × right → out)"), el("th", { class: "num", scope: "col" }, "operations"), el("th", { class: "num", scope: "col" }, "share"), el("th", { scope: "col" }, "source operation"))), el("tbody", {}, rows))),
    el("h3", {}, "The two programs"), tally("Traced by jax", c.primitives), tally("After the compiler", c.instructions),
    el("details", {}, el("summary", {}, "The layer as jax sees it (jaxpr)"), el("pre", { tabindex: "0" }, c.jaxpr)),
    el("details", {}, el("summary", {}, "The optimised program (HLO)"), el("pre", { tabindex: "0" }, c.hlo)));
};
const startInside = () => {
  section("attention", drawAttention, ["layer", "token"]);
  section("heads", drawHeads, ["layer", "theme"]);
  section("compiled", drawCompiled);
};

const drawHeader = () => {
  const r = data.run, text = data.routing, all = sum(text.keep.map((k) => k.length)), dropped = all - sum(text.keep.map(sum));
  byId("run-name").textContent = `· ${r.name}, step ${whole(r.step)}`;
  byId("lead").textContent = `A language model of ${L} layers reads a text. In each layer a router sends every token to ${K} of ${E} experts. This page shows each of these decisions: which expert got which token, ${model.dropless ? "" : "what found no room, "}and which tokens each expert prefers.`;
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
