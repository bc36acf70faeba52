// Curves of metrics.jsonl, and the routing that was saved at each evaluation.
const drawTraining = () => {
  const t = data.training, box = clear(byId("training-figures"));
  const add = (title, note, ...parts) => box.append(el("figure", {}, caption(title, note), ...parts));
  if (t.step.length < 2) box.append(el("p", { class: "small" }, "The folder of the run has no metrics.jsonl with training records."));
  else drawCurves(t, add);
  if (t.traces.step.length > 1) drawTraces(t.traces, add);
  else box.append(el("p", { class: "small" }, "No routing was saved during this run (its folder has no traces), so the page cannot show how the choices changed."));
  if (t.step.length > 1) drawLoads(t, add);
};
const whenStepped = (options) => lineChart({ x: "step", from: 0, ...options });

const drawCurves = (t, add) => {
  const one = (name, colour, y) => ({ name, colour, x: t.step, y });
  const losses = [one("training", "var(--accent)", t.loss)];
  if (t.val.step.length) losses.push({ name: "validation subset", colour: "var(--warn)", dash: "5 3", x: t.val.step, y: t.val.loss });
  add("Loss", "Nats for each predicted token.", whenStepped({ series: losses }), key(losses));
  if (t.val.bits_per_byte.length > 1) {
    const { floor } = data.run;
    add("Bits per byte", `Bits per byte of the fixed validation subset that is scored during training${floor === null ? "" : ". On the whole validation text no model can be below its entropy"}.`,
      whenStepped({ series: [{ name: "validation subset", colour: "var(--accent)", x: t.val.step, y: t.val.bits_per_byte }], marks: floor === null ? [] : [{ y: floor, text: `entropy of the whole text: ${floor.toFixed(3)}`, below: true }] }));
  }
  const balance = t.balance_loss.filter((v) => v !== null);
  add("Balance loss", "1 is perfect balance.", whenStepped({ series: [one("balance loss", "var(--accent)", t.balance_loss)], bottom: Math.min(1, ...balance), marks: [{ y: 1, text: "balanced" }] }));
  add("Choices dropped", "In training, all layers together.", whenStepped({ series: [one("dropped", "var(--accent)", t.drop_fraction)], format: (v) => percent(v, 0) }));
  const evenness = layerSeries(t.step, t.spread);
  add("Evenness of the load", "Entropy of the experts' shares, divided by the largest possible: 1 is even, 0 means that one expert takes all.", whenStepped({ series: evenness, bottom: null, top: 1 }), key(evenness));
};

const drawLoads = (t, add) => {
  range(L).forEach((l) => add(`Load of each expert, layer ${l}`, "Each row is an expert, each column is a step.",
    stripes({ label: `Load of each expert in layer ${l} by step`, rows: E, columns: t.step.length, side: Math.max(4, Math.min(22, 200 / E)), names: range(E).map(String),
      paint: (e, c) => [expertColour(e), Math.min(1, t.load[c][l][e] * E / 2)], ticks: spread(t.step.length, 4), name: (c) => short(t.step[c]), axis: "step",
      say: (e, c) => `Step ${whole(t.step[c])}, expert ${e}: ${percent(t.load[c][l][e])} of the choices, ${(t.load[c][l][e] * E).toFixed(2)} times its fair share` }),
    scale("none", "2 × fair share or more", "var(--soft)")));
};

const drawTraces = (traces, add) => {
  const curve = (title, note, rows, options) => { const series = layerSeries(traces.step, rows); add(title, note, whenStepped({ series, ...options }), key(series)); };
  curve("How undecided the router is", "Entropy of its probabilities on validation text, at each evaluation: 0 is certain, 1 is undecided between all experts.", traces.entropy, { top: 1 });
  curve("Dropped on validation text", "Share of choices dropped in each layer, with the training capacity.", traces.drop, { format: (v) => percent(v, 0) });
  if (traces.step.length > 2) curve("How settled the choices are", "Share of tokens whose first choice is the same as at the evaluation before.", traces.same, { format: (v) => percent(v, 0), top: 1 });
  const { first, step, pieces } = traces.shown, n = pieces.length, layer = state.layer;
  add(`The same text as the routers learned, layer ${layer}`, `Each column is one of ${whole(n)} tokens of validation text, in the colour of its first choice. Each row is an evaluation, the last one at the bottom. If a column keeps its colour, the token always chose the same expert first.`,
    stripes({ label: `First choices of ${n} tokens at ${step.length} evaluations, layer ${layer}`, rows: step.length, columns: n, side: 18, names: step.map(short),
      paint: (r, c) => [expertColour(first[r][layer][c]), 1], ticks: spread(n, 4), name: (c) => whole(c + 1), axis: "token",
      say: (r, c) => `Step ${whole(step[r])}: “${quoted(pieces[c])}” (token ${whole(c + 1)}) chose expert ${first[r][layer][c]}` }));
  byId("training-figures").lastElementChild.classList.add("wide");
};
const startTraining = () => section("training", drawTraining, ["layer"]);
