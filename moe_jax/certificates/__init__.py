"""Claims about a model that are tested by running and compiling it: `python -m moe_jax certify`.

    certify.py           every certificate of a model
    causality.py         no token changes an earlier output
    perturbation.py      changes one token at a time, and counts the outputs that change
    reversed_chunks.py   a leak between neighbours, which the test of causality must find
    arithmetic.py        the arithmetic and the largest arrays of the compiled programs
    compilations.py      each program is compiled once
    on_mesh.py           the training step of several devices
    certificate.py       Certificate: the result of one test

The compiled programs are read by `system.hlo`.
"""
