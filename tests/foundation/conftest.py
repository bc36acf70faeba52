"""float64, and every shape annotation of `foundation` checked at run time."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
install_import_hook("foundation", "beartype.beartype")
