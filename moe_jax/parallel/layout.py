"""The mesh of a run, devices in a grid with the axes data, fsdp and expert; and where every array lies on it.

One table gives the logical axes of each matrix, by its name, and one gives the mesh axis of each logical axis. An array
that is not in the table (norms, biases, routers, counters) is whole on every device.

Everything that the optimizer keeps for a parameter lies as its updates do:

    moments and momentum        as the update
    row and column (Adafactor)  as the update, less the axis over which they are means
    codes and scale (8 bits)    blocks of the flattened array: as the update's first axis, if the blocks of each device
                                are whole; else whole on every device

An update lies as its parameter. Two optimizers need more of a matrix than fsdp leaves on a device: Muon multiplies
whole matrices, and the 8-bit blocks run across rows. Their updates and their state are not sharded over fsdp. What a
gradient sends: chapter 19 of `foundation`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_jax.config import ConfigError, MeshShape
from moe_jax.model.low_rank import SUFFIX

AXES = MeshShape._fields
"""Names of the axes, from the slowest to the fastest. Sequence i of a batch lies on device i // (B / devices)."""

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocabulary", "width"),
    "position": ("position", "width"),
    "head": ("width", "vocabulary"),
    "attention.qkv": ("width", "heads"),
    "attention.out": ("heads", "width"),
    "experts.w_in": ("expert", "width", "hidden"),
    "experts.w_gate": ("expert", "width", "hidden"),
    "experts.w_out": ("expert", "hidden", "width"),
    "shared.w_in": ("shared", "width", "hidden"),
    "shared.w_gate": ("shared", "width", "hidden"),
    "shared.w_out": ("shared", "hidden", "width"),
}
"""End of a parameter's name -> its logical axes."""
MESH_AXES = {"width": "fsdp", "expert": "expert"}
"""Logical axis -> the mesh axis that it is sharded over. The other logical axes are not."""

type Specs = dict[str, PartitionSpec]
"""Name of a parameter -> the mesh axis of each of its axes."""


def mesh_of(text: str, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that `--mesh` names, on all devices of all processes unless `devices` are given.

    None for a mesh of one device: the run then uses the programs for one device. Raises ConfigError unless the mesh has
    as many places as there are devices.
    """
    shape = MeshShape.parse(text)
    if shape.devices == 1:
        return None
    available = jax.devices() if devices is None else list(devices)
    if shape.devices != len(available):
        found = "1 device" if len(available) == 1 else f"{len(available)} devices"
        raise ConfigError(
            f"--mesh {text}: has {shape.devices} places, and JAX sees {found} ({available[0].platform}); "
            f"give a mesh whose product is {len(available)}, or data=1 for one device"
        )
    # jax.make_mesh makes Explicit axes unless told otherwise, and the model's gathers would then need annotations.
    return Mesh(create_device_mesh(shape, available), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def mesh_axes(name: str) -> tuple[str | None, ...]:
    """The mesh axis over which each axis of a parameter or of an adapter is sharded. Empty for an array that is not in
    the table.

    An adapter of a matrix `[*E, D, F]` is a `[*E, D, R]` and b `[*E, R, F]` (`model/low_rank.py`).
    """
    *_, group, end, last = ("", "", *name.split("."))
    adapted = end.endswith(SUFFIX)
    matrix = f"{group}.{end.removesuffix(SUFFIX)}" if adapted else f"{end}.{last}" if end else last
    axes = LOGICAL_AXES.get(matrix, ())
    if adapted:
        axes = (*axes[:-1], "rank") if last == "a" else (*axes[:-2], "rank", axes[-1])
    return tuple(MESH_AXES.get(axis) for axis in axes)


def parameter_spec(name: str, mesh: Mesh) -> PartitionSpec:
    """Where the parameter of this name lies. A mesh axis of one device is left out."""
    return PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in mesh_axes(name)))


@dataclass(frozen=True)
class Layout:
    """Where the arrays of one configuration lie."""

    mesh: Mesh
    params: Specs
    """Where the parameters lie, and the adapters if there are any."""
    updates: Specs
    """Where gradients, updates and the optimizer's state lie, of what is trained."""

    @classmethod
    def of(cls, mesh: Mesh, params: Any, whole_matrices: Any, adapters: Any = None) -> "Layout":
        """The layout of the parameters `params` (arrays or shapes), and of `adapters` if only these are trained.

        `whole_matrices` has the structure of what is trained. It is true where the optimizer needs whole matrices.
        """
        paths = jax.tree_util.tree_leaves_with_path(params) + jax.tree_util.tree_leaves_with_path(adapters)
        specs = {leaf_name(path): parameter_spec(leaf_name(path), mesh) for path, _ in paths}
        whole = {leaf_name(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(whole_matrices)}
        updates = {
            name: PartitionSpec(*(None if needs_whole and axis == "fsdp" else axis for axis in specs[name]))
            for name, needs_whole in whole.items()
        }
        return cls(mesh, specs, updates)

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def batch(self) -> PartitionSpec:
        """[M, B, ...]: the sequences of each micro-batch are divided over all devices."""
        return PartitionSpec(None, AXES)

    def same_on_all_devices(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as one that all devices of the mesh compute alike. Arguments and results are whole on every
        device."""
        whole = PartitionSpec()
        return jax.shard_map(function, mesh=self.mesh, in_specs=whole, out_specs=whole, check_vma=False)

    def tree(self, params: Any, specs: Specs) -> Any:
        """The specs of parameters as a tree like `params`."""
        return _map_named(lambda name, _: specs[name], params)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def shardings(self, params: Any, specs: Specs) -> Any:
        """The same as `tree`, as shardings of this mesh."""
        return _map_named(lambda name, _: self.sharding(specs[name]), params)

    def placed_shapes(self, params: Any) -> Any:
        """The shapes of parameters or adapters, which need not be those of this configuration, with their shardings.

        An axis that cannot be divided evenly is whole, such as the one network of a dense model along `expert`.
        """

        def placed(name: str, x: Any) -> jax.ShapeDtypeStruct:
            axes = zip(parameter_spec(name, self.mesh), x.shape, strict=False)
            even = [axis if axis and n % self.mesh.shape[axis] == 0 else None for axis, n in axes]
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(PartitionSpec(*even)))

        return _map_named(placed, params)

    def state(self, state: Any) -> Any:
        """The shardings of a `TrainState` (arrays or shapes)."""
        return _map_named(lambda name, leaf: self.sharding(self.state_spec(name, leaf.shape)), state)

    def state_spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Where the leaf of a training state lies: "params.NAME", "adapters.NAME" or "optimizer. ... .NAME[.FIELD]"."""
        for kind in ("params.", "adapters."):
            if name.startswith(kind):
                return self.params[name.removeprefix(kind)]
        parameter, field = self._parameter_in(name)
        if parameter is None:
            return PartitionSpec()
        spec = self.updates[parameter]
        if field == "":
            return spec
        if not any(spec):
            return PartitionSpec()
        if field in ("row", "column"):
            return PartitionSpec(*(spec[:-1] if field == "row" else (*spec[:-2], spec[-1])))
        if field in ("codes", "scale"):
            even = spec[0] is not None and shape[0] % self.mesh.shape[spec[0]] == 0
            return PartitionSpec(spec[0]) if even else PartitionSpec()
        raise ValueError(f"{name}: the layout does not know what {field!r} of {parameter} is; add it to state_spec")

    def _parameter_in(self, name: str) -> tuple[str | None, str]:
        """The parameter whose name is in the name of a state's leaf, and what follows it. The longest one, if several
        are: `blocks.0.ffn_norm.scale` and not `norm.scale`."""
        inside = [p for p in self.updates if f".{p}." in f".{name}."]
        longest = max(inside, key=len, default=None)
        return longest, "" if longest is None else f".{name}.".rpartition(f".{longest}.")[2].rstrip(".")

    def constrain(self, updates: Any) -> Any:
        """The updates of some or all parameters, made to lie as `updates` says. For use inside `jax.jit`."""

        def placed(name: str, x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x, self.sharding(self.updates[name]))

        return _map_named(placed, updates)

    def mean_gradients(self, grads: Any) -> Any:
        """The mean over all devices of gradients that are whole along fsdp, sharded as `updates`. Inside `shard_map`.

        The gradient of an expert's matrix is already the sum over the devices that sent it tokens: the all-to-alls'
        own gradients have brought it there. So it is not summed over the axis `expert` again.
        """

        def scatter(name: str, grad: Array) -> Array:
            for dimension, axis in enumerate(self.updates[name]):
                if axis == "fsdp":
                    grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dimension, tiled=True)
            return grad

        grads = _map_named(scatter, grads)
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        # One sum for all arrays of the same axes, so that there are as few collectives as possible.
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, (path, _) in enumerate(leaves):
            spec = self.updates[leaf_name(path)]
            groups.setdefault(tuple(a for a in AXES if a not in spec and self.mesh.shape[a] > 1), []).append(number)
        summed = [leaf for _, leaf in leaves]
        for axes, members in groups.items():
            if axes:
                for number, total in zip(members, jax.lax.psum([summed[n] for n in members], axes), strict=True):
                    summed[number] = total
        return tree.unflatten([total / self.devices for total in summed])


# Inside `shard_map`, where arrays are the parts of one device


def gathered(params: Any) -> Any:
    """Parameters, of a model or of a part of it, whole along the mesh axis `fsdp`."""

    def gather(name: str, x: Array) -> Array:
        for dimension, axis in enumerate(mesh_axes(name)):
            if axis == "fsdp" and jax.lax.axis_size(axis) > 1:
                x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
        return x

    return _map_named(gather, params)


def _map_named(function: Callable[[str, Any], Any], params: Any) -> Any:
    """A tree of function(name, leaf)."""
    return jax.tree_util.tree_map_with_path(lambda path, x: function(leaf_name(path), x), params)
