"""A sparse mixture-of-experts language model in JAX. `load_run` opens what `train.py` left."""
