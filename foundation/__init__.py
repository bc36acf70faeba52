"""Every gradient of a mixture-of-experts transformer, derived by hand in `jax.numpy`.

Each operation is a pair of functions:

    out, cache = NAME_forward(inputs)          the value, and what the backward pass needs of it
    gradients  = NAME_backward(d_out, cache)   d_out is dLoss/d_out; so are the names d_x, d_kernel, ...

No module here asks jax for a derivative but `parity.py`, which holds every pair against `jax.grad` and
against finite differences: `python -m foundation` prints that table. `README.md` beside this file is the
path through it.

The alphabet, in shapes, einsums and comments:

    B batch    T positions    D model width    H heads    A width of a head    L layers    V vocabulary
    E experts  K experts per token             C capacity of an expert         F hidden width of an expert
"""
