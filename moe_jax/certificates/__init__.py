"""Claims about a model that are tested by running and compiling it: `python -m moe_jax certify`.

    certify.py       every certificate of a model
    causality.py     no token changes an earlier output
    arithmetic.py    the arithmetic and the largest arrays of the compiled programs
    compilations.py  each program is compiled once
    certificate.py   Certificate: the result of one test

The compiled programs are read by `system.hlo`.
"""
