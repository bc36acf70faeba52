"""The checker of moe_jax's annotations during tests: beartype, where `float` accepts `int`, as in PEP 484."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
