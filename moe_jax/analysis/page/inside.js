// Attention of the chosen token, and the compiled layer.
const drawAttention = () => {
  const box = clear(byId("attention-figure")), { attention } = data;
  const i = state.token ?? Math.min(attention.tokens - 1, model.seq_len - 1, 24);
  if (i >= attention.tokens) {
    box.append(el("p", { class: "small" }, `Weights are kept for the first ${whole(attention.tokens)} tokens of a text; choose one of those.`));
    return;
  }
  const title = el("p", {}, "In layer ", el("b", {}, `${state.layer}`), ", ", el("b", { class: "quote" }, `“${quoted(data.text.pieces[i])}”`), ` (token ${whole(i + 1)}) looks at:`);
  const heads = range(attention.heads).map((h) => {
    const flat = attention.weights[state.layer][h][i], shown = [];
    for (let n = 0; n < flat.length; n += 2) shown.push([i - flat[n], flat[n + 1]]);
    const rest = 100 - sum(shown.map(([, w]) => w));
    return el("article", { class: "head" }, el("h4", {}, `Head ${h}`), el("ul", {}, shown.map(([j, w]) =>
      el("li", { title: `token ${j + 1}` }, el("span", {}, j === i ? "itself" : context(j)), el("div", { class: "bar", vars: { width: `${w}%` } }), el("span", {}, `${w} %`)))),
    rest > 1 ? el("p", { class: "small" }, `${Math.round(rest)} % elsewhere`) : null);
  });
  box.append(title, el("div", { class: "heads" }, heads));
};
const context = (j) => (j > 0 && j % model.seq_len ? quoted(data.text.pieces[j - 1]).replace(/␣/g, " ") : "") + quoted(data.text.pieces[j]).replace(/␣/g, " ");

const drawCompiled = () => {
  const c = data.compiled, box = clear(byId("compiled-figure"));
  const giga = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} G` : `${(n / 1e6).toFixed(2)} M`);
  const begin = `One MoE layer, forward, for one window of ${whole(model.seq_len)} tokens, compiled for ${c.platform}`;
  byId("compiled-explain").textContent = !c.dots.length
    ? `${begin}. The compiler hands the matrix products to a library here, so the program does not list them; filling exactly the slots needs ${giga(c.bound)} operations of them.`
    : `${begin}: every matrix product in the optimised program. ` +
    `The experts' products cost ${giga(c.expert_flops)} operations; filling exactly the slots needs ${giga(c.bound)} (ratio ${(c.expert_flops / c.bound).toFixed(3)}), and running every expert on every token would need ${giga(c.dense)}.`;
  const rows = c.dots.map((d) => el("tr", {}, el("td", {}, el("code", {}, d.shapes)), el("td", { class: "num" }, giga(d.flops)), el("td", { class: "num" }, percent(d.flops / c.total)), el("td", {}, d.source)));
  box.append(!rows.length ? "" : el("div", { class: "scroll" }, el("table", { id: "dots" }, el("thead", {}, el("tr", {}, el("th", {}, "Matrix product"), el("th", { class: "num" }, "operations"), el("th", { class: "num" }, "share"), el("th", {}, "where it comes from"))), el("tbody", {}, rows))),
    el("details", {}, el("summary", {}, "The layer as jax sees it (jaxpr)"), el("pre", { tabindex: "0" }, c.jaxpr)),
    el("details", {}, el("summary", {}, "The optimised program (HLO)"), el("pre", { tabindex: "0" }, c.hlo)));
};
const startInside = () => {
  section("attention", drawAttention, ["layer", "token"]);
  section("compiled", drawCompiled);
};

const drawHeader = () => {
  const r = data.run, text = data.routing, all = sum(text.keep.map((k) => k.length)), dropped = all - sum(text.keep.map(sum));
  byId("run-name").textContent = `· ${r.name}, step ${whole(r.step)}`;
  byId("lead").textContent = `A language model of ${L} layers reads a text. In each layer a router sends every token to ${K} of ${E} experts. This page shows each of those decisions: who got which token, what found no room, and what the experts turned out to be for.`;
  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)));
  fill(byId("facts"), {}, [
    fact("Text", count(N, "token"), `${data.text.source.toLowerCase()}; ${count(L * K * N, "decision")}`),
    fact("Model", `${(r.params_total / 1e6).toFixed(1)} M`, `parameters, of which ${(r.params_active / 1e6).toFixed(1)} M touch a token`),
    r.val_bits_per_byte === null ? null : fact("Bits per byte", r.val_bits_per_byte.toFixed(3), r.floor === null ? "on the validation text" : `on the validation text; ${r.floor.toFixed(3)} is its entropy`),
    model.dropless ? fact("Dropped", "none", "this dispatch has no capacity") : fact("Dropped here", percent(dropped / all), `of all choices, in all layers; ${model.capacity} slots for each expert and window`),
    corpus ? fact("Router entropy", (sum(corpus.entropy) / L).toFixed(2), "0 is certain, 1 knows nothing") : null,
  ]);
};
