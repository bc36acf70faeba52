// How often each expert was chosen in the chosen layer, as bars that fill while the text is written.
let counts = []; // [expert layers][experts]: choices of the tokens shown
const clearCounts = () => { counts = range(layersShown()).map(() => new Array(model.experts).fill(0)); };
const countToken = (token, sign = 1) => token.experts?.forEach((row, l) => { for (const e of row) counts[l][e] += sign; });

const loadsBox = byId("loads");
const startLoads = () => {
  clearCounts();
  fill(clear(loadsBox), {}, range(model.experts).map((e) => el("button", {
    type: "button", "data-expert": e, "aria-pressed": "false", vars: { "--c": colourOf(e), "--on": inkOn(e) },
    title: `Light up the tokens that chose expert ${e}`, onclick: () => change("lit", state.lit === e ? null : e),
  }, el("b", {}, `${e}`), el("span", { class: "share" }), el("span", { class: "track", "aria-hidden": "true" }, el("i", { class: "fill" }), el("i", { class: "even" })))));
  for (const box of [loadsBox, tokensBox]) box.classList.toggle("many", model.experts > 16);
  loadsBox.classList.toggle("crowd", model.experts > 32);
  roving(loadsBox, "button");
  drawLoads();
};

// A bar is full at twice the even share, or at the largest share if that is more.
const drawLoads = () => {
  if (!model.experts) return;
  const row = counts[state.layer], all = sum(row), even = 1 / model.experts;
  const top = Math.max(2 * even, all ? Math.max(...row) / all : 0);
  loadsBox.style.setProperty("--even", `${100 * even / top}%`);
  [...loadsBox.children].forEach((button, e) => {
    const share = all ? row[e] / all : 0;
    button.style.setProperty("--share", `${100 * share / top}%`);
    button.children[1].textContent = all ? percent(share, 0) : "";
    button.setAttribute("aria-label", `Expert ${e}${all ? `, ${percent(share, 0)} of the choices, the even share is ${percent(even, 0)}` : ""}`);
  });
};
listeners.push((what) => {
  if (what === "layer") drawLoads();
  if (what === "lit") for (const button of loadsBox.children) button.setAttribute("aria-pressed", String(Number(button.dataset.expert) === state.lit));
});
