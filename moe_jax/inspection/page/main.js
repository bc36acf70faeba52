const drawOwn = () => {
  byId("own-command").textContent = `uv run python -m moe_jax inspect --run runs/${data.run.name} --text "A small dragon lost its hat."`;
};
// The text is drawn first, so that there is something to read. Each other section is drawn when it comes near the window.
drawHeader();
startText();
requestAnimationFrame(() => {
  startExperts();
  startAblation();
  startCapacity();
  startTraining();
  startInside();
  drawOwn();
  drawCard();
});
