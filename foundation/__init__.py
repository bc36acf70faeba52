"""Every gradient of a mixture-of-experts transformer, derived by hand in `jax.numpy`."""
