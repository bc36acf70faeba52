"""What checks the annotations of moe_jax while tests run: beartype, with `float` admitting `int` as PEP 484 says."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
