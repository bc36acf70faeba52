"""The embedded corpus: stories from a grammar that gives each story an exact probability."""
