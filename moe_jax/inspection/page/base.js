// What all scripts share: the data, the colours, small builders, and the state of the page. The user's text becomes only
// text nodes and attributes, so it is never parsed as markup.
const data = JSON.parse(document.getElementById("routing-data").textContent);
const { model } = data;
const L = model.layers, E = model.experts, K = model.top_k, N = data.text.pieces.length;
const byId = (id) => document.getElementById(id);

const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "vars") for (const [v, x] of Object.entries(value)) node.style.setProperty(v, x);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return node;
};
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const clear = (node) => { node.replaceChildren(); return node; };

// The first eight differ in lightness as well as in hue, for readers who tell few hues apart (after Okabe and Ito).
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc6fa3", "#56b4e9", "#d55e00", "#b5a300", "#7a4fa3",
  "#737373", "#8c564b", "#12a5b5", "#8fbf26", "#2b4aa8", "#f28eb1", "#5f7a1f", "#b8253a"];
const wheel = (hue, light) => "#" + [0, 8, 4].map((n) => {
  const k = (n + hue / 30) % 12, v = light - 0.55 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
  return Math.round(255 * v).toString(16).padStart(2, "0");
}).join("");
const expertColour = (e) => PALETTE[e] ?? wheel((e * 137.5) % 360, 0.38 + 0.12 * (e % 3));
const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const luminance = (hex) => channels(hex).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
  .reduce((all, c, i) => all + c * [0.2126, 0.7152, 0.0722][i], 0);
const inkOn = (e) => (luminance(expertColour(e)) > 0.179 ? "#000000" : "#ffffff");
// Thousands of tokens change colour at once. So each rule holds its colour as numbers: resolving a variable for each
// token would be slow.
const sheet = document.styleSheets[0];
for (let e = 0; e < E; e++) {
  const colour = expertColour(e), at = channels(colour).join(" ");
  sheet.insertRule(`:root { --e${e}: ${colour}; }`, 0);
  for (const rule of [
    `.a${e} { background-color: rgb(${at} / var(--tint)); }`,
    `.a${e}.da { background: repeating-linear-gradient(135deg, rgb(${at} / var(--hatch)) 0 2px, transparent 2px 6px); }`,
    `.b${e} { border-bottom-color: ${colour}; }`,
  ]) sheet.insertRule(rule, sheet.cssRules.length);
}
const colourOf = (e) => `var(--e${e})`;

const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}\u00a0%`;
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const whole = (n) => n.toLocaleString("en");
const sum = (xs) => xs.reduce((a, b) => a + b, 0);
const range = (n) => Array.from({ length: n }, (_, i) => i);

// Control characters and other invisible characters are shown by their code, so that they cannot rearrange the page.
const INVISIBLE = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
const visible = (piece) => piece.replace(INVISIBLE, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const quoted = (piece) => visible(piece).replace(/\n/g, "↵").replace(/^ | $/g, "␣");

const choice = (layer, token, k) => {
  const r = data.routing, i = token * K + k;
  return { expert: r.expert[layer][i], gate: r.gate[layer][i], slot: r.slot[layer][i], kept: r.keep[layer][i] === 1 };
};
const probability = (layer, token, e) => data.routing.prob[layer][token * E + e];

// The state, and the listeners that are called when it changes: `what` is "layer", "token", "lit", "off" or "theme". A section
// is drawn when it first comes near the window. If the state that it shows changes, it is drawn again as soon as it is
// near. It waits until the text is on the screen, and several changes in a row are drawn once, so a slider stays fast.
const state = { layer: 0, token: null, lit: null, off: null };
const listeners = [];
const change = (what, value) => {
  state[what] = value;
  for (const listener of listeners) listener(what);
};
const sections = [];
const section = (id, draw, shows = [], redraw = draw) => {
  let next = draw, near = false, due = false;
  const soon = () => {
    if (!next || !near || due) return;
    due = true;
    requestAnimationFrame(() => setTimeout(() => { due = false; now(); }));
  };
  const now = () => { const task = next; next = null; task?.(); };
  sections.push({ node: byId(id), now });
  listeners.push((what) => { if (shows.includes(what)) { next ??= redraw; soon(); } });
  new IntersectionObserver((entries) => {
    near = entries.at(-1).isIntersecting;
    if (near && next === draw) now(); else soon();
  }, { rootMargin: "250px" }).observe(byId(id));
  window.addEventListener("beforeprint", now);
};

const tip = byId("tip");
const showTip = (event, text) => {
  tip.textContent = text;
  tip.hidden = false;
  const box = event.currentTarget.getBoundingClientRect();
  const x = event.clientX || box.left + box.width / 2, y = event.clientY || box.bottom;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.min(y + 14, innerHeight - tip.offsetHeight - 8)}px`;
};
const hideTip = () => { tip.hidden = true; };
const tipped = (text) => ({
  onpointermove: (event) => showTip(event, text), onpointerleave: hideTip,
  onfocus: (event) => showTip(event, text), onblur: hideTip,
});
// One tab stop for a group: arrow keys, Home and End move the focus among the items that `selector` finds. `across` and
// `down` say by how many items the arrow keys move.
const roving = (group, selector, { across = 1, down = 1 } = {}) => {
  const items = () => [...group.querySelectorAll(selector)];
  const pick = (chosen) => items().forEach((item) => item.setAttribute("tabindex", item === chosen ? "0" : "-1"));
  const first = items();
  if (first.length) pick(first.find((item) => item.getAttribute("aria-pressed") === "true") ?? first[0]);
  if (group.roving) return;
  group.roving = true;
  group.addEventListener("focusin", (event) => { const item = event.target.closest(selector); if (item) pick(item); });
  group.addEventListener("keydown", (event) => {
    const all = items(), at = all.indexOf(event.target.closest(selector));
    const rtl = event.target.parentElement.dir === "rtl" ? -1 : 1;
    const to = { ArrowRight: at + rtl * across, ArrowLeft: at - rtl * across, ArrowDown: at + down, ArrowUp: at - down, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    all[to]?.focus();
  });
};
const caption = (title, note) => el("figcaption", {}, title, note ? el("small", {}, note) : null);

// The bar at the top stays in view, so what is scrolled to has to stop below it. It names the section that is read.
const bar = byId("bar");
new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
const links = new Map([...bar.querySelectorAll(".tabs a")].map((a) => [a.hash.slice(1), a]));
const mark = (id) => links.forEach((link, name) => {
  if (name !== id) { link.removeAttribute("aria-current"); return; }
  link.setAttribute("aria-current", "true");
  link.parentElement.scrollTo({ left: link.offsetLeft - 80 });
});
const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
const reading = new IntersectionObserver((entries) => {
  const entry = entries.find((e) => e.isIntersecting);
  if (entry && !atEnd()) mark(entry.target.id);
}, { rootMargin: "-35% 0px -64% 0px" });
for (const id of links.keys()) reading.observe(byId(id));
addEventListener("scroll", () => { if (atEnd()) mark("own"); }, { passive: true });
// What a link of the page leads to must not move while it is scrolled to, so all that is above it is drawn first.
document.addEventListener("click", (event) => {
  const hash = event.target.closest("a[href^='#']")?.hash, to = hash && byId(hash.slice(1));
  if (!to) return;
  for (const { node, now } of sections) if (node === to || node.compareDocumentPosition(to) & Node.DOCUMENT_POSITION_FOLLOWING) now();
});
// On paper all is unfolded, but for long tables and listings, which are left out (details without the class `unfold`).
let folded = [];
window.addEventListener("beforeprint", () => { folded = [...document.querySelectorAll("details.unfold:not([open])")]; for (const d of folded) d.open = true; });
window.addEventListener("afterprint", () => { for (const d of folded) d.open = false; });

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  change("theme", root.dataset.theme);
});
