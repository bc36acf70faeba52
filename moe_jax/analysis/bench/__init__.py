"""What the model costs by the clock: the parts of `benchmark.py`."""
