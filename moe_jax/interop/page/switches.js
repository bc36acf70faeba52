// Experts can be switched off: the next text is written as if they did not exist. What stands already keeps its colours.
const off = []; // off[l]: the experts of layer l that are off, in the order in which they were switched off
const switchedOff = () => off.map((experts) => [...experts]);
const startTransport = () => {
  listeners.push((what) => { if (what === "layer" || what === "lit") drawSwitches(); });
};
const flip = (layer, e) => {
  const experts = off[layer] ??= [];
  if (!experts.includes(e)) experts.push(e);
  else experts.splice(experts.indexOf(e), 1);
  drawSwitches();
  drawLoads();
};
const drawSwitches = () => {};
