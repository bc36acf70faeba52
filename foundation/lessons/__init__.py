"""What the notebooks need beside the mathematics: their exercises, and the code that draws their pictures."""
