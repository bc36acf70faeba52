"""README.md and docs/: links, sentences, and every line of code."""
