// Experts can be switched off: the next text is written as if they did not exist. A text on the page keeps its colours.
const off = []; // off[l]: the experts of layer l that are off, in the order in which they were switched off
const switchedOff = () => range(layersShown()).map((l) => [...off[l] ?? []]);
const offLayers = () => range(layersShown()).filter((l) => off[l]?.length);
const aside = () => offLayers().map((l) => `without expert ${off[l].join(", ")} in layer ${layerName(l)}`).join(", ");

const flip = (layer, e) => {
  const experts = off[layer] ??= [];
  if (experts.includes(e)) experts.splice(experts.indexOf(e), 1);
  else experts.push(e);
  drawSwitches();
};
const drawSwitches = () => {
  const layer = state.layer, here = off[layer] ?? [], e = state.lit, some = offLayers().length > 0, where = `in layer ${layerName(layer)}`;
  [...loadsBox.children].forEach((button, n) => {
    const isOff = here.includes(n);
    button.classList.toggle("off", isOff);
    button.title = `Light up the tokens that chose expert ${n}${isOff ? ". It is off" : ""}`;
  });
  const last = e !== null && !here.includes(e) && here.length === model.experts - 1;
  show("switches", true);
  fill(clear(byId("switches")), {}, [
    e === null ? !some && el("span", {}, "Press an expert to see its tokens or switch it off.")
      : el("button", { type: "button", id: "flip", disabled: last, onclick: () => { flip(layer, e); change("lit", null); loadsBox.children[e].focus(); } }, `Switch expert ${e} ${here.includes(e) ? "on again" : "off"} ${where}`),
    some && el("button", { type: "button", id: "all-on", onclick: () => { off.length = 0; drawSwitches(); } }, "All on"),
    some && el("span", { class: "without" }, `Now ${aside()}.`),
    some && turns.length > 0 && el("button", { type: "button", id: "rewrite", title: "The last part once more, with the same seed", onclick: quietly(() => rewrite(turns.at(-1).seed)) }, "Write it again"),
  ]);
};
const startTransport = () => listeners.push((what) => { if (what === "layer" || what === "lit") drawSwitches(); });
