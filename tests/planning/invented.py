"""Cards and memory for tests of plans, without a compiler for GPUs."""

from moe_jax.planning.device_memory import Memory
from moe_jax.planning.target import Target


def target(capability: str = "8.6", memory: int = 2**30) -> Target:
    major, minor = capability.split(".")
    text = f"gpu {{ device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }} }}"
    return Target("card", f'{text}\ndevice_description_str: "A card 1"')


def memory(total: float) -> Memory:
    return Memory(total / 2, total / 4, total / 4)
