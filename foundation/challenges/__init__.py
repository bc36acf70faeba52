"""Things to do: derive a backward pass and have it checked, and find a bug that was planted."""
