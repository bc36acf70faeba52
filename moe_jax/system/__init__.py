"""Services that the other rooms use: environment before jax starts, signals, files, locks, console, random keys,
compilation cache, timing."""
