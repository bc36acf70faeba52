// Small charts by hand: lines, bars and heat maps as SVG.
const WIDTH = 420;

const niceTop = (top) => {
  const unit = 10 ** Math.floor(Math.log10(top || 1));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((m) => m * unit).find((v) => v >= top - 1e-12);
};
const short = (v) => (Math.abs(v) >= 10000 ? `${+(v / 1000).toPrecision(3)}k` : `${+v.toPrecision(3)}`);

// Lines over one x axis. series: [{name, colour, x, y}]; y may hold nulls. marks: [{x | y, text}] are dashed.
const lineChart = ({ series, height = 210, x = "", format = short, bottom = 0, top = null, marks = [], ticks = null }) => {
  const frame = { left: 46, right: 12, top: 14, bottom: 34 };
  const xs = series.flatMap((s) => s.x), ys = series.flatMap((s) => s.y).filter((v) => v !== null && Number.isFinite(v));
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const y0 = bottom ?? Math.min(...ys), y1 = Math.max(top ?? (niceTop(Math.max(...ys) - y0) + y0), y0 + 1e-9);
  const px = (v) => frame.left + (WIDTH - frame.left - frame.right) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5);
  const py = (v) => height - frame.bottom - (height - frame.top - frame.bottom) * (v - y0) / (y1 - y0);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
  for (const share of [0, 0.5, 1]) {
    const v = y0 + share * (y1 - y0);
    root.append(svg("line", { class: "axis", x1: frame.left, x2: WIDTH - frame.right, y1: py(v), y2: py(v) }),
      svg("text", { x: frame.left - 6, y: py(v) + 4, "text-anchor": "end" }, format(v)));
  }
  for (const v of ticks ?? [x0, (x0 + x1) / 2, x1]) {
    root.append(svg("text", { x: px(v), y: height - frame.bottom + 16, "text-anchor": v === x0 ? "start" : v === x1 ? "end" : "middle" }, short(v)));
  }
  root.append(svg("text", { x: (frame.left + WIDTH - frame.right) / 2, y: height - 4, "text-anchor": "middle" }, x));
  for (const mark of marks) {
    const at = mark.x !== undefined ? { x1: px(mark.x), x2: px(mark.x), y1: frame.top, y2: py(y0) } : { x1: frame.left, x2: WIDTH - frame.right, y1: py(mark.y), y2: py(mark.y) };
    root.append(svg("line", { class: "ref", ...at }),
      svg("text", { class: "strong", x: mark.x !== undefined ? at.x1 + 5 : at.x2, y: mark.x !== undefined ? frame.top + 8 : at.y1 - 5, "text-anchor": mark.x !== undefined ? "start" : "end" }, mark.text));
  }
  for (const s of series) {
    let path = "", pen = "M";
    s.y.forEach((v, i) => {
      if (v === null || !Number.isFinite(v)) { pen = "M"; return; }
      path += `${pen}${px(s.x[i]).toFixed(1)},${py(v).toFixed(1)}`;
      pen = "L";
    });
    const line = svg("path", { class: "line", d: path, stroke: s.colour, "stroke-dasharray": s.dash ?? null });
    root.append(line);
    if (s.x.length < 40) s.y.forEach((v, i) => v !== null && root.append(svg("circle", { cx: px(s.x[i]), cy: py(v), r: 3, fill: s.colour, ...tipped(`${s.name}\n${x} ${short(s.x[i])}: ${format(v)}`) })));
  }
  return root;
};

const key = (series) => el("div", { class: "key" }, series.map((s) => {
  const swatch = svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: s.colour, "stroke-width": 3, "stroke-dasharray": s.dash ?? null }));
  swatch.style.width = "22px";
  swatch.style.display = "inline-block";
  return el("span", {}, swatch, ` ${s.name}`);
}));

// Layers are told apart by shade and dash, not by an expert's colour.
const layerColour = (l) => `color-mix(in oklab, var(--accent) ${100 - 70 * (L > 1 ? l / (L - 1) : 0)}%, var(--warn))`;
const layerDash = (l) => [null, "6 3", "2 2", "8 3 2 3"][l % 4];
const layerSeries = (x, rows) => rows.map((y, l) => ({ name: `layer ${l}`, colour: layerColour(l), dash: layerDash(l), x, y }));

// A grid of cells. values[row][column] in 0..1 of `top`; `say(row, column)` is the tip.
const heatMap = ({ values, top, rows, columns, colour, say, cell = null, rowTitle = "", columnTitle = "" }) => {
  const height = cell ?? Math.max(10, Math.min(34, 240 / values.length)), left = 38, foot = 32;
  const width = (WIDTH - left) / values[0].length;
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${values.length * height + foot}`, role: "img" });
  values.forEach((row, r) => {
    root.append(svg("text", { x: left - 6, y: (r + 0.5) * height + 4, "text-anchor": "end" }, rows[r]));
    row.forEach((v, c) => root.append(svg("rect", { x: left + c * width, y: r * height, width: width + 0.3, height: height + 0.3,
      fill: typeof colour === "function" ? colour(r, c, v) : colour, "fill-opacity": top ? Math.min(v / top, 1) : 1, ...tipped(say(r, c, v)) })));
  });
  const every = Math.ceil(columns.length / 16);
  columns.forEach((name, c) => { if (c % every === 0) root.append(svg("text", { x: left + (c + 0.5) * width, y: values.length * height + 13, "text-anchor": "middle" }, name)); });
  root.append(svg("text", { x: (left + WIDTH) / 2, y: values.length * height + 28, "text-anchor": "middle" }, columnTitle),
    svg("text", { x: 4, y: -4 }, rowTitle));
  return root;
};

// Upright bars, one for each expert, with dashed lines of reference.
const expertBars = ({ values, references, format, say, height = 210 }) => {
  const frame = { left: 46, right: 10, top: 18, bottom: 34 };
  const top = niceTop(Math.max(...values, ...references.map((r) => r.y)) || 1);
  const py = (v) => height - frame.bottom - (height - frame.top - frame.bottom) * v / top;
  const step = (WIDTH - frame.left - frame.right) / values.length;
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
  for (const share of [0, 0.5, 1]) root.append(svg("line", { class: "axis", x1: frame.left, x2: WIDTH - frame.right, y1: py(share * top), y2: py(share * top) }),
    svg("text", { x: frame.left - 6, y: py(share * top) + 4, "text-anchor": "end" }, format(share * top)));
  values.forEach((v, e) => {
    root.append(svg("rect", { x: frame.left + (e + 0.14) * step, width: step * 0.72, y: py(v), height: Math.max(py(0) - py(v), 0.5), rx: 2, fill: colourOf(e), ...tipped(say(e, v)) }),
      svg("text", { x: frame.left + (e + 0.5) * step, y: height - frame.bottom + 15, "text-anchor": "middle" }, `${e}`));
  });
  references.forEach((r, i) => root.append(svg("line", { class: "ref", x1: frame.left, x2: WIDTH - frame.right, y1: py(r.y), y2: py(r.y) }),
    svg("text", { class: "strong", x: i % 2 ? frame.left + 4 : WIDTH - frame.right, y: py(r.y) - 5, "text-anchor": i % 2 ? "start" : "end" }, r.text)));
  root.append(svg("text", { x: (frame.left + WIDTH - frame.right) / 2, y: height - 4, "text-anchor": "middle" }, "expert"));
  return root;
};
