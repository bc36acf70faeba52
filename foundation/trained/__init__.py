"""A trained run of the real model, read from its folder and run by the hand-derived code alone."""
