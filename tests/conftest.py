"""Settings shared by all tests: the CPU, and a compilation cache that lasts for the session."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
