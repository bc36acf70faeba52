// All layers at a glance: one row for each layer with experts, one column for each token.
const barcode = byId("barcode");
const drawBarcode = () => {
  const rows = layersShown(), n = tokens.length;
  if (!rows) return;
  barcode.closest(".glance").hidden = !n;
  const side = Math.max(12, Math.min(26, 160 / rows)), width = Math.max(barcode.clientWidth, 100), scale = devicePixelRatio || 1;
  barcode.style.height = `${side * rows}px`;
  barcode.width = width * scale;
  barcode.height = side * rows * scale;
  const paint = barcode.getContext("2d"), colours = range(model.experts).map(expertColour), step = width / Math.max(n, 1);
  paint.scale(scale, scale);
  tokens.forEach(({ experts }, i) => experts?.forEach((row, l) => {
    const k = state.lit === null ? 0 : row.indexOf(state.lit);
    if (k < 0) return;
    paint.globalAlpha = k === 0 ? 1 : 0.45;
    paint.fillStyle = colours[row[k]];
    paint.fillRect(i * step, l * side + 1, Math.max(step - (step > 4 ? 1 : 0), 0.7), side - 2);
  }));
  markBarcode();
};
const markBarcode = () => {
  const row = byId("barcode-layer"), column = byId("barcode-token"), rows = Math.max(layersShown(), 1), n = Math.max(tokens.length, 1);
  row.style.height = `${100 / rows}%`;
  row.style.top = `${100 * state.layer / rows}%`;
  column.hidden = state.token === null;
  column.style.left = `${100 * (state.token ?? 0) / n}%`;
  column.style.width = `max(3px, ${100 / n}%)`;
};
const startGlance = () => {
  listeners.push((what) => {
    if (what === "lit") requestAnimationFrame(drawBarcode);
    if (what === "layer" || what === "token") markBarcode();
  });
  barcode.addEventListener("click", (event) => {
    const box = barcode.getBoundingClientRect();
    setLayer(Math.floor((event.clientY - box.top) / box.height * layersShown()));
    if (!tokens.length) return;
    chooseToken(Math.min(tokens.length - 1, Math.floor((event.clientX - box.left) / box.width * tokens.length)));
    state.held = true;
    nodes[state.token].scrollIntoView({ block: "nearest" });
  });
  window.addEventListener("resize", drawBarcode);
  drawBarcode();
};
