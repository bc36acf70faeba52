// The experts on the validation text: load, entropy, pairs, and the tokens in which each expert specialises.
const corpus = data.corpus;
const examples = (group) => group.tokens.map(({ text: t }) => `“${quoted(t).replaceAll("␣", "") || "␣"}”`).join(", ");
const listed = (parts) => (parts.length < 2 ? parts.join("") : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`);

// The clearest specialists of the model, each for a different group of tokens: [layer, expert, its strongest group].
const clearest = (most) => {
  const all = data.specialisation.flatMap((layer, l) => layer.flatMap((entry, e) => entry.groups.slice(0, 1).map((group) => [l, e, group])));
  const found = [];
  for (const one of all.sort((a, b) => b[2].g2 - a[2].g2)) {
    if (found.length < most && found.every((other) => other[2].name !== one[2].name && (other[0] !== one[0] || other[1] !== one[1]))) found.push(one);
  }
  return found;
};
const specialists = () => {
  const found = clearest(4);
  if (!found.length) return `No expert prefers a whole kind of token. Some may prefer single tokens.`;
  const [first, ...rest] = found.map(([l, e, g]) => `expert ${e} of layer ${l} in ${g.name} (${examples(g)}; ${percent(g.reach, 0)} of them choose it)`);
  return `The clearest specialists: ${listed([first, ...rest])}. By chance an expert would get ${percent(K / E, 0)} of each kind.`;
};

// A long list of experts in a few words. The map below shows where they are.
const few = (list) => {
  const by = range(L).map((l) => [l, list.filter((d) => d.layer === l).length]).filter(([, n]) => n).sort((a, b) => b[1] - a[1]);
  return `${whole(list.length)} of ${whole(L * E)} experts; most in layer ${by[0][0]}, ${by[0][1]} of its ${E}`;
};
const drawVerdict = () => {
  const loads = corpus.load.flat(), fair = 1 / E, dead = corpus.dead.filter((d) => d.dead), starved = corpus.dead.filter((d) => !d.dead);
  const most = Math.max(...loads) / fair, named = (list) => (list.length > 8 ? few(list) : listed(list.map((d) => `expert ${d.expert} of layer ${d.layer}`)));
  const parts = [dead.length ? `Dead, chosen by no token at all: ${named(dead)}.` : "No expert is dead: every one is chosen by some token."];
  if (starved.length) parts.push(`Starved, below a tenth of a fair share: ${named(starved)}.`);
  parts.push(`The busiest expert has ${most.toFixed(2)} times its fair share.`);
  parts.push(most > E / K * 0.7 && E > K ? "The router has collapsed onto a few experts." : most > 2 ? "The load is uneven." : "The load is well spread.");
  const box = clear(byId("verdict"));
  box.classList.toggle("bad", dead.length > 0 || most > 2);
  box.append(el("p", {}, parts.join(" ")));
};

// Every expert at once: how loaded it is.
const drawMap = () => {
  const [accent, warn] = paletteOf("--accent", "--warn");
  fill(clear(byId("map")), {}, [
    caption("Every expert in every layer", `Its share of the choices. ${corpus.dead.length ? "Red: starved, below a tenth of a fair share; full red: dead. " : ""}Press a cell to go to its layer and to light up its tokens in the text.`),
    expertMap({ label: "Load of every expert in every layer", side: Math.max(12, Math.min(26, 300 / L)), pressed: "goes to the layer and lights up the expert",
      paint: (l, e) => { const load = corpus.load[l][e] * E; return load ? (load < 0.1 ? [warn, 0.35] : [accent, Math.min(1, load / 2)]) : [warn, 1]; },
      say: (l, e) => `Layer ${l}, expert ${e}: ${percent(corpus.load[l][e], 2)} of the choices, ${(corpus.load[l][e] * E).toFixed(2)} times its fair share`,
      press: (l, e) => { setLayer(l); change("lit", e); } }),
    scale("none", "2 × fair share or more"),
  ]);
};
const lightUp = (e) => {
  change("lit", e);
  byId("text").scrollIntoView();
};
const chip = (t, tip) => el("li", { tabindex: "0", "data-token": t.text, ...tipped(tip) }, quoted(t.text), el("small", {}, ` ${percent(t.here / t.all, 0)}`));
const specialistCard = (e) => {
  const found = data.specialisation[state.layer][e];
  const counted = (t) => `${quoted(t.text)}: ${whole(t.here)} of its ${whole(t.all)} occurrences chose this expert`;
  const kinds = found.groups.map((g) => el("div", { class: "kind" }, el("p", {}, el("b", {}, `${g.name}:`), ` ${percent(g.here, 0)} of its choices, ${percent(g.all, 0)} of the text`),
    el("ul", { class: "words" }, g.tokens.map((t) => chip(t, counted(t))))));
  const named = new Set(found.groups.flatMap((g) => g.tokens.map((t) => t.text)));
  const words = found.tokens.filter((t) => !named.has(t.text)).map((t) => chip(t, `${counted(t)}, ${t.times} times what chance would give (G² ${t.g2}, p < 0.001 after correction)`));
  const article = el("article", { class: "specialist", vars: { "--c": colourOf(e) } },
    el("h4", {}, el("button", { type: "button", title: `Light up the tokens of expert ${e} in the text`, onclick: () => lightUp(e) }, `Expert ${e}`), el("small", {}, `load ${percent(corpus.load[state.layer][e])}`)),
    kinds,
    el("p", {}, found.kinds ? `${count(found.kinds, "token")} of the vocabulary ${found.kinds === 1 ? "prefers" : "prefer"} it, ${percent(found.share, 0)} of its choices. ${words.length ? `The strongest${kinds.length ? " besides these" : ""}:` : ""}` : corpus.load[state.layer][e] ? "No token prefers it beyond chance." : "Dead: no token chose it."),
    words.length ? el("ul", { class: "words strongest" }, words) : null);
  roving(article, "li");
  return article;
};

// Of many experts the clearest specialists stand first, and the others are folded.
const MOST_CARDS = 12;
const drawSpecialists = () => {
  const entries = data.specialisation[state.layer], clarity = (e) => entries[e].groups[0]?.g2 ?? -1;
  const order = MANY ? range(E).sort((a, b) => clarity(b) - clarity(a) || (entries[b].tokens[0]?.g2 ?? 0) - (entries[a].tokens[0]?.g2 ?? 0)) : range(E);
  const most = MANY ? MOST_CARDS : E, rest = el("div", { class: "specialists" }), box = byId("other-specialists");
  fill(clear(byId("specialists")), {}, order.slice(0, most).map(specialistCard));
  box.hidden = !MANY;
  box.open = false;
  fill(clear(box), {}, [el("summary", {}, `The other ${E - most} experts of layer ${state.layer}`), rest]);
  box.ontoggle = () => { if (box.open && !rest.firstChild) fill(rest, {}, order.slice(most).map(specialistCard)); };
};

const drawCounts = () => {
  const box = byId("counts"), open = box.open, heads = ["Expert", "Token", "chose it", "occurs", "times chance", "G²"];
  const table = () => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads.map((h, i) => el("th", { class: i > 1 ? "num" : null, scope: "col" }, h)))),
    el("tbody", {}, data.specialisation[state.layer].flatMap((entry, e) => entry.tokens.map((t) => el("tr", {}, el("td", {}, `${e}`), el("td", {}, el("code", {}, quoted(t.text))),
      [whole(t.here), whole(t.all), t.times.toFixed(2), whole(t.g2)].map((v) => el("td", { class: "num" }, v))))))));
  fill(clear(box), {}, [el("summary", {}, `All counts of layer ${state.layer} as a table`), open ? table() : null]);
  box.ontoggle = () => { if (box.open && !box.querySelector("table")) box.append(table()); };
};

const drawExperts = () => {
  const layer = state.layer;
  byId("experts-explain").textContent =
    `Measured on ${count(corpus.tokens, "token")} of the run's validation text, in layer ${layer}. Each card names the kinds of token that prefer the expert, with examples, and then the single tokens that prefer it, strongest first. The percentage says how often the token chose the expert. A token chooses ${K} of ${E} experts, so by chance it would be ${percent(K / E, 0)}. ␣ is a space.`;
  drawSpecialists();
  drawCounts();
  const fair = 1 / E, line = model.capacity / (model.seq_len * K);
  fill(clear(byId("load")), {}, [
    caption(`Load of each expert in layer ${layer}`, model.dropless ? "Share of all choices." : "Share of all choices, before drops. The capacity line is the share that an expert's slots can take if all windows are alike."),
    expertBars({ label: `Load of each expert in layer ${layer}`, values: corpus.load[layer], format: (v) => percent(v, 0), references: [{ y: fair, text: "fair share" }, ...(model.dropless ? [] : [{ y: line, text: "capacity" }])],
      say: (e, v) => `Expert ${e}: ${percent(v, 2)} of the choices, ${(v / fair).toFixed(2)} times its fair share` }),
  ]);
  fill(clear(byId("entropy")), {}, [
    caption("How undecided the router is, and what it drops", "Entropy of the router's probabilities, divided by the largest possible: 0 is certain, 1 means that all experts are equally likely. The last column says it in experts: as undecided as an even choice among so many."),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Layer"), ["entropy", "dropped", "busiest (× fair)", "in experts"].map((h) => el("th", { class: "num", scope: "col" }, h)))),
      el("tbody", {}, range(L).map((l) => el("tr", { class: l === layer ? "shown" : null }, el("td", {}, `${l}`), el("td", { class: "num" }, corpus.entropy[l].toFixed(3)),
        el("td", { class: "num" }, percent(corpus.drops[l], 2)), el("td", { class: "num" }, `${corpus.load[l].indexOf(Math.max(...corpus.load[l]))} (${(Math.max(...corpus.load[l]) / fair).toFixed(2)})`), el("td", { class: "num" }, alike(corpus.entropy[l]))))))),
  ]);
  drawTogether(layer);
};

const drawTogether = (layer) => {
  const box = clear(byId("together"));
  if (K < 2) {
    box.append(caption("Which experts are chosen together", "Each token chooses only one expert in this model, so there are no pairs."));
    return;
  }
  const pairs = corpus.together[layer], all = pairs.map((row, i) => row[i]);
  // By chance, pairs would be drawn from the experts' own shares. They are scaled to the real number of pairs.
  const total = sum(pairs.flatMap((row, i) => row.filter((_, j) => j > i)));
  const chance = sum(range(E).flatMap((i) => range(E).filter((j) => j > i).map((j) => all[i] * all[j])));
  const ratio = pairs.map((row, i) => row.map((n, j) => (!all[i] || !all[j] ? 0 : n / (all[i] * all[j] / chance * total))));
  const [accent, line] = paletteOf("--accent", "--line");
  fill(box, {}, [
    caption(`Which experts are chosen together in layer ${layer}`, "A stronger colour means that the two experts share more tokens than expected by chance from their loads."),
    stripes({ label: `Pairs of experts in layer ${layer}`, rows: E, columns: E, side: Math.max(5, Math.min(34, 240 / E)), names: range(E).map(String), ticks: expertTicks, name: String, axis: "expert and expert",
      paint: (i, j) => (i === j ? [line, 0.6] : [accent, Math.min(1, ratio[i][j] / 3)]),
      say: (i, j) => (i === j ? `Expert ${i}: ${whole(all[i])} tokens` : `Experts ${i} and ${j}: ${whole(pairs[i][j])} tokens together, ${ratio[i][j].toFixed(2)} times chance`) }),
    scale("never", "3 × chance or more"),
  ]);
};

// Alluvial diagram: a column for each layer, a band for each pair of first choices in successive layers.
const MOST_BANDS = 128; // between two layers, if there are many experts
const drawFlow = () => {
  const box = clear(byId("flow-figure"));
  if (L < 2) { box.append(el("p", { class: "small" }, "This model has one layer, so there is no flow between layers.")); return; }
  const height = Math.max(340, E * (MANY ? 12 : 26)), width = Math.max(Math.min(760, box.clientWidth - 32), L * 100), bar = 26, gap = Math.min(8, 100 / E), left = 14;
  const total = sum(corpus.flow[0].flat()), scale = (height - gap * (E - 1)) / total;
  const sizes = range(L).map((l) => (l < L - 1 ? corpus.flow[l].map(sum) : range(E).map((e) => sum(corpus.flow[L - 2].map((row) => row[e])))));
  const tops = sizes.map((column) => { let y = 0; return column.map((n) => { const at = y; y += n * scale + gap; return at; }); });
  const x = (l) => left + l * (width - bar - 2 * left) / (L - 1);
  const root = svg("svg", { viewBox: `0 -24 ${width} ${height + 30}`, role: "group", "aria-label": "Flow of tokens between the experts of successive layers" });
  root.style.minWidth = `${Math.min(width, Math.max(640, L * 80))}px`;
  const show = (l, e) => {
    root.classList.add("flowing");
    for (const band of root.querySelectorAll(".band")) {
      const [bl, i, j] = band.dataset.way.split(",").map(Number);
      band.classList.toggle("through", (bl === l && i === e) || (bl === l - 1 && j === e));
    }
  };
  const hide = () => { root.classList.remove("flowing"); hideTip(); };
  let shown = 0;
  corpus.flow.forEach((matrix, l) => {
    const least = MANY ? matrix.flat().sort((a, b) => b - a)[MOST_BANDS] : 0;
    const out = tops[l].slice(), into = tops[l + 1].slice(), [a, b] = [x(l) + bar, x(l + 1)], middle = (a + b) / 2;
    for (let i = 0; i < E; i++) for (let j = 0; j < E; j++) {
      const n = matrix[i][j], thick = n * scale;
      if (!n) continue;
      const [y, z] = [out[i], into[j]];
      out[i] += thick; into[j] += thick;
      if (thick < 0.15 || n <= least) continue;
      shown += n;
      root.append(svg("path", { class: "band", "data-way": `${l},${i},${j}`, fill: colourOf(i),
        d: `M${a},${y.toFixed(1)}C${middle},${y.toFixed(1)} ${middle},${z.toFixed(1)} ${b},${z.toFixed(1)}v${thick.toFixed(2)}C${middle},${(z + thick).toFixed(1)} ${middle},${(y + thick).toFixed(1)} ${a},${(y + thick).toFixed(1)}z`,
        ...tipped(`${whole(n)} tokens: expert ${i} in layer ${l}, then expert ${j} in layer ${l + 1}\n${percent(n / Math.max(sizes[l][i], 1))} of those that left expert ${i}; ${percent(sizes[l + 1][j] / total)} by chance`) }));
    }
  });
  range(L).forEach((l) => {
    root.append(svg("text", { class: "strong", x: x(l) + bar / 2, y: -10, "text-anchor": "middle" }, `layer ${l}`));
    range(E).forEach((e) => {
      const h = Math.max(sizes[l][e] * scale, 1), words = data.specialisation[l][e].tokens.slice(0, 4).map((t) => quoted(t.text)).join("  ");
      const text = `Layer ${l}, expert ${e}: first choice of ${whole(sizes[l][e])} tokens (${percent(sizes[l][e] / total)})${words ? `\n${words}` : ""}`;
      root.append(svg("rect", { class: "node", x: x(l), y: tops[l][e], width: bar, height: h, rx: 3, fill: colourOf(e), tabindex: "0", role: "img", "aria-label": text,
        onpointermove: (event) => { show(l, e); showTip(event, text); }, onpointerleave: hide, onfocus: (event) => { show(l, e); showTip(event, text); }, onblur: hide }));
      if (h > 10) root.append(svg("text", { x: x(l) + bar / 2, y: tops[l][e] + h / 2 + 4, "text-anchor": "middle", "pointer-events": "none", class: "on-node", vars: { "--on": inkOn(e) } }, `${e}`));
    });
  });
  roving(root, ".node", { across: E });
  fill(box, {}, [caption("Paths of first choices", `${count(total, "token")} of validation text. A band has the colour of the expert that it comes from.${MANY ? ` Only the strongest bands are drawn, up to ${MOST_BANDS} between two layers; they hold ${percent(shown / total / (L - 1), 0)} of the steps.` : ""}`), el("div", { class: "scroll" }, root)]);
};

const without = (id) => fill(clear(byId(id)), {}, [el("p", { class: "small" }, data.corpus_missing ?? "Not available.")]);
const startExperts = () => {
  if (!corpus) {
    byId("experts-explain").textContent = data.corpus_missing;
    for (const id of ["map", "load", "entropy", "together", "verdict", "counts", "tested"]) byId(id).remove();
    without("flow-figure");
    return;
  }
  byId("found").append(el("p", { id: "specialists-said" }, specialists()));
  byId("experts-tested").textContent = "A single token is listed if it chooses the expert more often than by chance: log-likelihood ratio G², p < 0.001 after correction for all pairs tested. A kind of token is named if its tokens, each different token counted once, choose the expert more often than by chance: p < 0.01 after correction for all kinds and experts of the model. Its examples are its most frequent tokens of those that choose the expert more often than by chance. Point at a token for its counts.";
  section("experts", () => { drawVerdict(); drawMap(); drawExperts(); }, ["layer"], drawExperts);
  listeners.push((what) => {
    if (what === "layer") byId("map").querySelector(".frame")?.style.setProperty("--row", state.layer);
    if (what === "theme" && byId("map").firstChild) { drawMap(); drawTogether(state.layer); }
  });
  section("flow", drawFlow);
};
