"""One program on many devices: the mesh, where each array lies on it, and what the devices send each other.

    mesh.py           the mesh of a run, made from `--mesh`
    layout.py         the table from logical axes to mesh axes: where each parameter and each optimizer state lies
    experts.py        the layer in training: its rows travel to the devices of their experts and back
    processes.py      several processes that train one run: connected, compared, stopped together
    global_arrays.py  arrays that lie on the devices of several processes

The gradient is one `shard_map` around the whole model. A group of the router is one sequence, and every sequence lies
on one device, so routing needs no communication. The optimizer is divided by the compiler (GSPMD), by the layout of
its arrays. `training/on_mesh.py` puts these pieces together.
"""
