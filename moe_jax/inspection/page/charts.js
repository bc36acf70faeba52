// Small charts without a library: lines and bars as SVG, maps of many cells on a canvas.
const WIDTH = 420;

const niceStep = (step) => {
  const unit = 10 ** Math.floor(Math.log10(step || 1));
  return [1, 2, 2.5, 5, 10].map((m) => m * unit).find((v) => v >= step * 0.999);
};
// Round values that cover `low` to `high` in about `n` steps.
const axisOf = (low, high, n = 4) => {
  const step = niceStep(Math.max(high - low, 1e-9) / n), first = Math.floor(low / step + 1e-6), last = Math.ceil(high / step - 1e-6);
  return range(Math.max(last - first, 1) + 1).map((i) => +((first + i) * step).toPrecision(12));
};
const inside = (ticks, low, high) => ticks.filter((v) => v >= low - 1e-9 && v <= high + 1e-9);
const short = (v) => (Math.abs(v) >= 10000 ? `${+(v / 1000).toPrecision(3)}k` : `${+v.toPrecision(3)}`);

// Lines over one x axis. series: [{name, colour, x, y, dash, weak}]; y may hold nulls. marks: [{x | y, text}] are dashed.
const lineChart = ({ series, label, height = 210, x = "", format = short, from = null, bottom = 0, top = null, marks = [], ticks = null }) => {
  const frame = { left: 46, right: 14, top: 14, bottom: 36 };
  const xs = series.flatMap((s) => s.x), ys = series.flatMap((s) => s.y).filter((v) => v !== null && Number.isFinite(v));
  const [x0, x1] = [from ?? Math.min(...xs), Math.max(...xs)];
  const high = Math.max(...ys), rows = axisOf(bottom ?? Math.min(...ys), top ?? (high > (bottom ?? -Infinity) ? high : (bottom ?? 0) + 1));
  const [y0, y1] = [rows[0], rows.at(-1)];
  const px = (v) => frame.left + (WIDTH - frame.left - frame.right) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5);
  const py = (v) => height - frame.bottom - (height - frame.top - frame.bottom) * (v - y0) / (y1 - y0);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label ?? series.map((s) => s.name).join(", ") });
  for (const v of rows) {
    root.append(svg("line", { class: "axis", x1: frame.left, x2: WIDTH - frame.right, y1: py(v), y2: py(v) }),
      svg("text", { x: frame.left - 6, y: py(v) + 4, "text-anchor": "end" }, format(v)));
  }
  for (const v of ticks ?? inside(axisOf(x0, x1), x0, x1)) {
    root.append(svg("line", { class: "axis", x1: px(v), x2: px(v), y1: py(y0), y2: py(y0) + 4 }),
      svg("text", { x: px(v), y: height - frame.bottom + 16, "text-anchor": "middle" }, short(v)));
  }
  root.append(svg("text", { x: (frame.left + WIDTH - frame.right) / 2, y: height - 4, "text-anchor": "middle" }, x));
  for (const mark of marks) {
    const at = mark.x !== undefined ? { x1: px(mark.x), x2: px(mark.x), y1: frame.top, y2: py(y0) } : { x1: frame.left, x2: WIDTH - frame.right, y1: py(mark.y), y2: py(mark.y) };
    const place = mark.x !== undefined ? { x: at.x1 + 5, y: frame.top + 8 } : { x: frame.left + 4, y: at.y1 + (mark.below ? 13 : -5) };
    root.append(svg("line", { class: "ref", ...at }), svg("text", { class: "strong", ...place }, mark.text));
  }
  for (const s of series) {
    let path = "", pen = "M";
    s.y.forEach((v, i) => {
      if (v === null || !Number.isFinite(v)) { pen = "M"; return; }
      path += `${pen}${px(s.x[i]).toFixed(1)},${py(v).toFixed(1)}`;
      pen = "L";
    });
    root.append(svg("path", { class: s.weak ? "line weak" : "line", d: path, stroke: s.colour, "stroke-dasharray": s.dash ?? null }));
    if (s.x.length < 20) s.y.forEach((v, i) => v !== null && root.append(svg("circle", { class: s.weak ? "weak" : null, cx: px(s.x[i]), cy: py(v), r: 3, fill: s.colour, ...tipped(`${s.name}\n${x} ${short(s.x[i])}: ${format(v)}`) })));
  }
  return root;
};

const key = (series) => el("div", { class: "key" }, series.map((s) => {
  const swatch = svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: s.colour, "stroke-width": 3, "stroke-dasharray": s.dash ?? null }));
  swatch.style.width = "22px";
  swatch.style.display = "inline-block";
  return el("span", {}, swatch, ` ${s.name}`);
}));

// Layers differ in shade and dash, because the colours belong to experts. The chosen layer is drawn stronger.
const layerColour = (l) => `color-mix(in oklab, var(--accent) ${100 - 100 * (L > 1 ? l / (L - 1) : 0)}%, var(--warn))`;
const layerDash = (l) => [null, "7 3", "2 2", "9 3 2 3"][l % 4];
const layerSeries = (x, rows) => rows.map((y, l) => ({ name: `layer ${l}`, colour: layerColour(l), dash: layerDash(l), weak: l !== state.layer, x, y }));

// The legend of a shade: `low` has the colour of the panel, `high` has the full colour.
const scale = (low, high, colour = "var(--accent)", middle = null) => el("p", { class: "scale small" }, el("span", {}, low),
  el("span", { class: "ramp", vars: { "--c": colour }, "aria-hidden": "true" }), middle ? el("span", {}, middle) : null, el("span", {}, high));

// Rows of many cells, painted on a canvas. `paint(row, column)` gives [colour, strength]; x is labelled at `ticks`
// (columns) by `name`; `say(row, column)` gives the tip for the pointer and the arrow keys. `press(row, column)` answers a
// press and Enter, `pressed` says what it does. The arrow keys begin at `at`. One row may be `framed`.
const stripes = ({ rows, columns, side, paint, say, label, names, ticks, name, axis, press = null, pressed = "", at = [0, 0], framed = null }) => {
  const canvas = el("canvas", { role: "img", tabindex: "0", "aria-label": `${label}. Arrow keys move through it${pressed && `, Enter ${pressed}`}.` });
  canvas.width = columns * Math.max(1, Math.ceil(900 / columns));
  canvas.height = Math.round(rows * side * 2);
  const pen = canvas.getContext("2d"), step = canvas.width / columns, every = Math.ceil(11 / side);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    const [colour, strength] = paint(r, c);
    pen.globalAlpha = strength;
    pen.fillStyle = colour;
    pen.fillRect(c * step, r * side * 2, step - (press ? 1 : 0), side * 2 - (side > 12 || press ? 2 : 0));
  }
  const tell = (event, r, c) => {
    at = [Math.max(0, Math.min(rows - 1, r)), Math.max(0, Math.min(columns - 1, c))];
    const box = canvas.getBoundingClientRect(); // the tip stands below the cell
    showTip({ currentTarget: canvas, clientX: event.clientX || box.left + (at[1] + 0.5) * box.width / columns, clientY: event.clientY || box.top + (at[0] + 1) * box.height / rows }, say(...at));
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    tell(event, Math.floor((event.clientY - box.top) / box.height * rows), Math.floor((event.clientX - box.left) / box.width * columns));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("focus", (event) => { if (canvas.matches(":focus-visible")) tell(event, ...at); });
  canvas.addEventListener("blur", hideTip);
  if (press) canvas.addEventListener("click", (event) => { point(event); press(...at); });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [0, 0] }[event.key];
    if (!way) return;
    event.preventDefault();
    tell(event, at[0] + way[0], at[1] + way[1]);
    if (event.key === "Enter") press?.(...at);
  });
  return el("div", { class: press ? "stripes pressed" : "stripes", vars: { "--side": `${side}px`, "--rows": rows } },
    el("div", { class: "names", "aria-hidden": "true" }, names.map((n, r) => el("span", {}, r % every ? "" : n))),
    el("div", { class: "framing" }, canvas, framed === null ? null : el("div", { class: "frame", vars: { "--row": framed } })),
    el("div", { class: "ticks", "aria-hidden": "true" }, ticks.map((c) => el("span", { vars: { left: `${100 * (c + 0.5) / columns}%` } }, name(c)))),
    el("div", { class: "axis-name" }, axis));
};
const expertTicks = range(E).filter((e) => e % Math.ceil(E / (MANY ? 8 : E)) === 0);
// Every expert of every layer: rows are layers, columns are experts. The chosen layer is framed.
const expertMap = (options) => stripes({ rows: L, columns: E, names: range(L).map(String), ticks: expertTicks, name: String, axis: "expert (across), layer (down)", framed: state.layer, ...options });
const paletteOf = (...names) => { const style = getComputedStyle(document.documentElement); return names.map((n) => style.getPropertyValue(n).trim()); };
// At most n columns, evenly spaced, the first and the last included.
const spread = (columns, n) => [...new Set(range(Math.min(n, columns)).map((i) => Math.round(i * (columns - 1) / Math.max(Math.min(n, columns) - 1, 1))))];

// Vertical bars, one for each expert, pale above `most`. Dashed reference lines have their names at the right.
const expertBars = ({ values, references, format, say, label, most = Infinity, height = 210 }) => {
  const frame = { left: 46, right: references.length ? 66 : 10, top: 14, bottom: 36 };
  const rows = axisOf(0, Math.max(...values, ...references.map((r) => r.y)) || 1), top = rows.at(-1);
  const py = (v) => height - frame.bottom - (height - frame.top - frame.bottom) * v / top;
  const step = (WIDTH - frame.left - frame.right) / values.length, every = Math.ceil(16 / step);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "group", "aria-label": label });
  for (const v of rows) root.append(svg("line", { class: "axis", x1: frame.left, x2: WIDTH - frame.right, y1: py(v), y2: py(v) }),
    svg("text", { x: frame.left - 6, y: py(v) + 4, "text-anchor": "end" }, format(v)));
  values.forEach((v, e) => {
    root.append(svg("rect", { class: "expert-bar", x: frame.left + (e + 0.14) * step, width: step * 0.72, y: py(v), height: Math.max(py(0) - py(v), 0.5), rx: 2, fill: colourOf(e), tabindex: "0", role: "img", "aria-label": say(e, v), ...tipped(say(e, v)) }),
      e % every ? "" : svg("text", { x: frame.left + (e + 0.5) * step, y: height - frame.bottom + 15, "text-anchor": "middle" }, `${e}`));
    if (v > most) root.append(svg("rect", { x: frame.left + (e + 0.14) * step, width: step * 0.72, y: py(v), height: py(most) - py(v), fill: "var(--panel)", "fill-opacity": 0.65, "pointer-events": "none" }));
  });
  let last = -Infinity;
  for (const r of [...references].sort((a, b) => a.y - b.y)) {
    const lines = r.text.split("\n"), y = Math.min(py(r.y) + 4, last === -Infinity ? Infinity : last - 12 * lines.length);
    last = y;
    root.append(svg("line", { class: "ref", x1: frame.left, x2: WIDTH - frame.right + 2, y1: py(r.y), y2: py(r.y) }),
      ...lines.map((line, i) => svg("text", { class: "strong", x: WIDTH - frame.right + 5, y: y - 12 * (lines.length - 1 - i) }, line)));
  }
  root.append(svg("text", { x: (frame.left + WIDTH - frame.right) / 2, y: height - 4, "text-anchor": "middle" }, "expert"));
  roving(root, ".expert-bar");
  return root;
};
