"""One program on many devices: the mesh, where each array lies on it, and what the devices send each other.

    layout.py     the mesh of a run (`--mesh`), and where each parameter and each optimizer state lies on it
    experts.py    the layer in training: its rows travel to the devices of their experts and back
    processes.py  several processes that train one run: connected, compared, stopped together; and their arrays

The gradient is one `shard_map` around the whole model. A group of the router is one sequence, and every sequence lies
on one device, so routing needs no communication. The optimizer is divided by the compiler (GSPMD), by the layout of
its arrays. `training/gradients.py` puts these pieces together.
"""
