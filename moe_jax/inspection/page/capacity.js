// Slots: how many are filled, and what another capacity factor would have dropped.
const drawSlots = () => {
  const layer = state.layer, windows = Math.ceil(N / model.seq_len), wanted = range(E).map(() => range(windows).map(() => 0));
  for (let i = 0; i < N; i++) for (let k = 0; k < K; k++) wanted[choice(layer, i, k).expert][Math.floor(i / model.seq_len)]++;
  const most = wanted.map((w) => Math.max(...w));
  fill(clear(byId("slots")), {}, [
    caption(`Slots wanted in this text, layer ${layer}`, `${windows > 1 ? `For each expert, the largest number in one of the text's ${windows} windows.` : "The text fits into one window."}${model.dropless ? "" : " The pale part above the line was dropped."}`),
    expertBars({ label: `Slots wanted in layer ${layer}`, values: most, most: model.dropless ? Infinity : model.capacity, format: (v) => short(v), references: model.dropless ? [] : [{ y: model.capacity, text: `capacity\n${model.capacity} slots` }],
      say: (e, v) => `Expert ${e} was wanted ${count(v, "time")}` + (model.dropless ? "" : `: ${Math.min(v, model.capacity)} of ${model.capacity} slots filled, ${count(Math.max(0, v - model.capacity), "choice")} dropped`) }),
  ]);
};

const drawFactors = () => {
  const { factor, drop } = corpus.drops_by_factor;
  const series = layerSeries(factor, range(L).map((l) => drop.map((row) => row[l])));
  fill(clear(byId("factors")), {}, [
    caption(`What ${model.dropless ? "" : "other "}capacity factors would have dropped`, "Share of choices dropped, if the routing stays as it is. A factor of 1 gives each expert its fair share of slots."),
    lineChart({ label: "Share dropped by capacity factor", series, x: "capacity factor", ticks: [0.25, 1, 2, 3, 4], format: (v) => percent(v, v < 0.1 && v > 0 ? 1 : 0), marks: model.dropless ? [] : [{ x: model.capacity_factor, text: `this run: ${model.capacity_factor}` }] }), key(series),
  ]);
};

const startCapacity = () => {
  byId("capacity-explain").textContent = model.dropless
    ? `This run's dispatch (${model.dispatch}) has no capacity: every choice is served. The pictures show what a capacity would have done.`
    : `A window holds ${whole(model.seq_len)} tokens with ${count(K, "choice")} each. With capacity factor ${model.capacity_factor} each of the ${E} experts has ${whole(model.capacity)} slots a window: ${model.capacity_factor} times its fair share of ${+(model.seq_len * K / E).toFixed(2)}, rounded up.`;
  section("capacity", () => { drawSlots(); if (corpus) drawFactors(); }, ["layer"]);
  if (!corpus) { byId("factors").remove(); }
};
