// What the report and the serving page share: builders of elements, numbers as text, the keyboard within a group. The
// text of a user or of a model becomes only text nodes and attributes, so it is never parsed as markup.
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

const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}\u00a0%`;
// A whole number with commas. The browser's own `toLocaleString` takes 20 ms when it is called first.
const whole = (n) => `${n}`.replace(/\B(?=(\d{3})+$)/g, ",");
const count = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
const sum = (xs) => xs.reduce((a, b) => a + b, 0);
const range = (n) => Array.from({ length: n }, (_, i) => i);

// Control characters and other invisible characters are shown by their code, so that they cannot rearrange the page.
const INVISIBLE = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
const visible = (piece) => piece.replace(INVISIBLE, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const quoted = (piece) => visible(piece).replace(/\n/g, "↵").replace(/^ | $/g, "␣");

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

// The button that switches between light and dark. `changed` is called with the new theme.
const startTheme = (changed = () => {}) => byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  changed(root.dataset.theme);
});
