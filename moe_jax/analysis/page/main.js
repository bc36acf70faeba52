// Text first, so that there is something to read; each other part when it comes near the window.
drawHeader();
startText();
requestAnimationFrame(() => {
  startExperts();
  startCapacity();
  startTraining();
  startInside();
  drawCard();
});
