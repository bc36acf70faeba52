// Slots: how full they are, what another capacity factor would have dropped, and where in a window drops fall.
const drawSlots = () => {
  const layer = state.layer, windows = Math.ceil(N / model.seq_len), wanted = range(E).map(() => range(windows).map(() => 0));
  for (let i = 0; i < N; i++) for (let k = 0; k < K; k++) wanted[choice(layer, i, k).expert][Math.floor(i / model.seq_len)]++;
  const most = wanted.map((w) => Math.max(...w));
  fill(clear(byId("slots")), {}, [
    caption(`Slots wanted in this text, layer ${layer}`, windows > 1 ? `The fullest of the text's ${windows} windows, for each expert.` : "By the tokens of this text, which is one window."),
    expertBars({ values: most, format: (v) => short(v), references: model.dropless ? [] : [{ y: model.capacity, text: `capacity: ${model.capacity} slots` }],
      say: (e, v) => `Expert ${e} was wanted ${count(v, "time")}` + (model.dropless ? "" : `: ${Math.min(v, model.capacity)} of ${model.capacity} slots filled, ${count(Math.max(0, v - model.capacity), "choice")} dropped`) }),
  ]);
};

const drawFactors = () => {
  const { factor, drop } = corpus.drops_by_factor;
  const series = layerSeries(factor, range(L).map((l) => drop.map((row) => row[l])));
  fill(clear(byId("factors")), {}, [
    caption("What other capacity factors would have dropped", "Share of choices dropped, with the routing as it is. A factor of 1 gives every expert exactly its fair share of slots."),
    lineChart({ series, x: "capacity factor", ticks: [0.25, 1, 2, 3, 4], format: (v) => percent(v, v < 0.1 && v > 0 ? 1 : 0), marks: [{ x: model.capacity_factor, text: `this run: ${model.capacity_factor}` }] }), key(series),
  ]);
  const { first, drop: at } = corpus.drops_by_position;
  const places = layerSeries(first, at);
  fill(clear(byId("positions")), {}, [
    caption("Where in a window drops fall", model.priority === "token"
      ? "Slots go to earlier tokens first, so it is the later ones that find an expert full. This keeps the model causal: no token can take the slot of one before it."
      : `Slots are given out by the rule ${model.priority}, under which a later token can take the slot of an earlier one.`),
    model.dropless ? el("p", { class: "small" }, "Nothing is dropped.") : lineChart({ series: places, x: "place in the window", format: (v) => percent(v, v < 0.1 && v > 0 ? 1 : 0), top: Math.max(0.01, niceTop(Math.max(...at.flat()))) }), model.dropless ? null : key(places),
  ]);
};

const startCapacity = () => {
  byId("capacity-explain").textContent = model.dropless
    ? `This run's dispatch (${model.dispatch}) has no capacity: every choice is served. The pictures show what a capacity would have done.`
    : `A window holds ${whole(model.seq_len)} tokens with ${count(K, "choice")} each. With capacity factor ${model.capacity_factor} each of the ${E} experts has ${whole(model.capacity)} slots a window: ${model.capacity_factor} times its fair share of ${+(model.seq_len * K / E).toFixed(2)}, rounded up.`;
  section("capacity", () => { drawSlots(); if (corpus) drawFactors(); }, ["layer"], drawSlots);
  if (!corpus) { byId("factors").remove(); byId("positions").remove(); }
};

// Curves of metrics.jsonl.
const drawTraining = () => {
  const t = data.training, box = clear(byId("training-figures"));
  if (!t || t.step.length < 2) { box.append(el("p", { class: "small" }, "No metrics.jsonl with training records lies in the run's folder.")); return; }
  const add = (title, note, ...parts) => box.append(el("figure", {}, caption(title, note), ...parts));
  const one = (name, colour, y) => ({ name, colour, x: t.step, y });
  const losses = [one("training", "var(--accent)", t.loss)];
  if (t.val.step.length) losses.push({ name: "validation", colour: "var(--warn)", x: t.val.step, y: t.val.loss });
  add("Loss", "Nats for each predicted token.", lineChart({ series: losses, x: "step" }), key(losses));
  add("Balance loss", "1 is perfect balance.", lineChart({ series: [one("balance loss", "var(--accent)", t.balance_loss)], x: "step", bottom: Math.min(1, ...t.balance_loss.filter((v) => v !== null)), marks: [{ y: 1, text: "balanced" }] }));
  add("Choices dropped", "In training, all layers together.", lineChart({ series: [one("dropped", "var(--accent)", t.drop_fraction)], x: "step", format: (v) => percent(v, 0) }));
  const spread = layerSeries(t.step, t.spread);
  add("Evenness of the load", "Entropy of the experts' shares: 1 is even, 0 is one expert that takes all.", lineChart({ series: spread, x: "step", bottom: null, top: 1 }), key(spread));
  if (t.certainty.step.length > 1) {
    const lines = layerSeries(t.certainty.step, range(L).map((l) => t.certainty.entropy.map((row) => row[l])));
    add("How undecided the router is", "Entropy of its probabilities at the saved checkpoints, 1 is knowing nothing.", lineChart({ series: lines, x: "step", top: 1 }), key(lines));
  }
  range(L).forEach((l) => add(`Load of each expert, layer ${l}`, "Each row an expert; full colour is twice the fair share.",
    heatMap({ values: range(E).map((e) => t.load.map((row) => row[l][e])), top: 2 / E, rows: range(E).map(String), columns: t.step.map(short), colour: (e) => colourOf(e), columnTitle: "step",
      say: (e, c, v) => `Step ${whole(t.step[c])}, expert ${e}: ${percent(v)}` })));
};
const startTraining = () => section("training", drawTraining);
