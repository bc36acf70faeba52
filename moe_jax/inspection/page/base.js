// What the scripts of the report share: the data, and the state of the page.
const data = JSON.parse(document.getElementById("routing-data").textContent);
const { model } = data;
const NARROW = matchMedia("(max-width: 60rem)"); // as in the style
const L = model.layers, E = model.experts, K = model.top_k, N = data.text.pieces.length;

const MANY = E > 16; // too many experts for a colour each
addColours(E);

const choice = (layer, token, k) => {
  const r = data.routing, i = token * K + k;
  return { expert: r.expert[layer][i], gate: r.gate[layer][i], slot: r.slot[layer][i], kept: r.keep[layer][i] === 1 };
};
const probability = (layer, token, e) => data.routing.prob[layer][token * E + e] / 10000;

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
const caption = (title, note) => el("figcaption", {}, title, note ? el("small", {}, note) : null);

// The bar at the top stays in view, so what is scrolled to has to stop below it. It names the section that is read.
const bar = byId("bar");
new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
const links = new Map([...bar.querySelectorAll(".tabs a")].map((a) => [a.hash.slice(1), a]));
const mark = (id) => !links.get(id).hasAttribute("aria-current") && links.forEach((link, name) => {
  if (name !== id) { link.removeAttribute("aria-current"); return; }
  link.setAttribute("aria-current", "true");
  // A tab must not move while it is pressed: the press would end on another one, and be lost.
  if (!bar.matches(":active")) link.parentElement.scrollTo({ left: link.offsetLeft - 120 });
});
// The section under a line just below the bar is read: the first one above all of them, and at the end of the page the
// one that a link led to, if it is in view, or the last.
const markRead = () => {
  const top = bar.offsetHeight, line = top + 0.1 * (innerHeight - top);
  const at = [...links.keys()].map((id) => byId(id)), above = at.filter((node) => node.getBoundingClientRect().top <= line);
  const end = innerHeight + scrollY >= document.documentElement.scrollHeight - 2, led = document.querySelector("section:target");
  const last = led?.getBoundingClientRect().top > 0 ? led : at.at(-1);
  mark((end ? last : above.at(-1) ?? at[0]).id);
};
addEventListener("scroll", markRead, { passive: true });
new ResizeObserver(markRead).observe(document.body);
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

startTheme((theme) => change("theme", theme));
