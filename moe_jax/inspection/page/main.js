// The text is drawn first, so that there is something to read. Each other section is drawn when it comes near the window.
drawHeader();
startText();
requestAnimationFrame(() => {
  startExperts();
  startCapacity();
  startTraining();
  startInside();
  drawCard();
});
