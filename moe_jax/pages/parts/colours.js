// The colours of the experts, and the shades of numbers.
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
const colourOf = (e) => `var(--e${e})`;
// Thousands of tokens change colour at once. So each rule holds its colour as numbers: resolving a variable for each
// token would be slow.
const addColours = (experts) => {
  const sheet = document.styleSheets[0];
  for (const e of range(experts)) {
    const colour = expertColour(e), at = channels(colour).join(" ");
    sheet.insertRule(`:root { --e${e}: ${colour}; }`, 0);
    for (const rule of [
      `.a${e} { background-color: rgb(${at} / var(--tint)); }`,
      `.a${e}.da { background: repeating-linear-gradient(135deg, rgb(${at} / var(--hatch)) 0 2px, transparent 2px 6px); }`,
      `.b${e} { border-bottom-color: ${colour}; }`,
    ]) sheet.insertRule(rule, sheet.cssRules.length);
  }
};

const SURPRISED = 8; // nats: the strongest shade
const surpriseShade = (nats) => Math.min(nats / SURPRISED, 1);
const CHANCES = [1, 0.5, 0.1, 0.01, Math.exp(-SURPRISED)];
// The legend of shaded tokens: a swatch for each of some values, each with its number. `vars(v)` gives the shade.
const heatScale = (values, vars, name, note) => el("p", { class: "heat small" }, el("span", { class: "swatches" }, values.map((v) => el("span", { class: "o", vars: vars(v) }, name(v)))), el("span", {}, note));
// The legend of tokens that are shaded by surprise: the chances of some shades.
const surpriseScale = (note) => heatScale(CHANCES.map((p) => -Math.log(p)), (nats) => ({ "--v": surpriseShade(nats), "--c": "var(--accent)" }),
  (nats) => (nats < SURPRISED ? percent(Math.exp(-nats), 0) : `${percent(Math.exp(-nats), 2)} or less`), note);
