"""The model in evaluation and in samples, inside `shard_map`: a device has parts of the matrices, as in training.

A block is gathered when its input is known, and not earlier. So a device holds its own parts, one whole block, and the
vocabulary head. Two kinds of passes differ in what they gather:

    EvaluatedTransformer   devices have different rows. A block is gathered along `fsdp` and `expert`.
    SampledTransformer     all devices have the same rows, and compute the same. A block is gathered along `fsdp` only.
                           A device computes what its own experts give, and all devices get the sum. With `OwnMoE`.

The rows of an expert meet the same products as on one device. All else that is summed over devices is zero. So the
bits are those of one device.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.kernels.quantized_matmul import QuantizedMatrix
from moe_jax.model.moe.dispatch import Blocks, Dispatch
from moe_jax.model.moe.experts import Experts, gated
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.transformer import Block, Transformer, split
from moe_jax.parallel.exchange import AXIS
from moe_jax.parallel.expert_blocks import BoundedBlocks, DeviceQueues
from moe_jax.parallel.layout import gathered, joined


class CutBlock(Block):
    """A block of which a device has parts. It is gathered when it is called."""

    axes: ClassVar[tuple[str, ...]] = ("fsdp",)
    """Mesh axes along which it is gathered."""

    def __call__(self, x: Array, *args: Any, **named: Any) -> Any:
        whole, x = self._gathered(x)
        return Block.__call__(whole, x, *args, **named)

    def decode(self, x: Array, *args: Any, **named: Any) -> Any:
        whole, x = self._gathered(x)
        return Block.decode(whole, x, *args, **named)

    def _gathered(self, x: Array) -> tuple[Block, Array]:
        """The whole block, and its input. Without the barrier the compiler may gather all blocks at the start."""
        graphdef, params = split(self)
        params, x = jax.lax.optimization_barrier((params, x))
        return nnx.merge(graphdef, nnx.State(gathered(params, self.axes))), x


class BlockWithAllExperts(CutBlock):
    axes = ("fsdp", "expert")


class SampledTransformer(Transformer):
    """See above."""

    block_type = CutBlock

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None) -> Float[Array, "B T D"]:
        """A device looks up its columns of the table. Then the rows are gathered, and not the table."""
        return joined(super()._embed(tokens, positions), "fsdp", dimension=2)

    def head_matrix(self) -> Float[Array, "D V"]:
        head = super().head_matrix()
        assert not isinstance(head, QuantizedMatrix), "quantised weights lie on one device"
        return joined(head, "fsdp", dimension=0)


class EvaluatedTransformer(SampledTransformer):
    """See above."""

    block_type = BlockWithAllExperts

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None) -> Float[Array, "B T D"]:
        """A device looks up its columns for the tokens of all devices along `fsdp`, which send each other the rows."""
        if jax.lax.axis_size("fsdp") == 1:
            return Transformer._embed(self, tokens, positions)
        columns = Transformer._embed(self, joined(tokens, "fsdp", dimension=0), positions)
        return jax.lax.all_to_all(columns, "fsdp", split_axis=0, concat_axis=2, tiled=True)


class OwnExperts(Experts):
    """Experts of which each device along the axis `expert` has its share, while all have the same rows."""

    def __call__(
        self,
        rows: Float[Array, "E R D"],
        further_expert: Int[Array, " further"] | None = None,
        gate: Float[Array, "E R"] | None = None,
    ) -> Float[Array, "E R D"]:
        """The network of each expert on its rows, and of the experts `further_expert` on the rows of further groups;
        each output times its gate. Not for training: the loop over these groups has no gradient."""
        if further_expert is not None:
            outputs = self.apply_blocks(rows, further_expert, jnp.int32(len(rows)))
            return outputs if gate is None else gated(outputs, gate)
        first = jax.lax.axis_index(AXIS) * self._own
        mine = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, self._own), (rows, gate))
        return joined(super().__call__(mine[0], gate=mine[1]), AXIS, dimension=0)

    def apply_blocks(
        self, rows: Float[Array, "G R D"], further_expert: Int[Array, " further"], used: Int[Array, ""]
    ) -> Float[Array, "G R D"]:
        experts = self._own * jax.lax.axis_size(AXIS)
        first = self(rows[:experts])
        if len(rows) == experts:
            return first

        def add_block(g: Array, y: Array) -> Array:
            place, is_own = self._place(further_expert[g - experts])
            block = jax.lax.cond(is_own, self.apply_single_expert, lambda x, _: jnp.zeros_like(x), rows[g], place)
            return y.at[g - experts].set(block)

        further = jax.lax.fori_loop(experts, used, add_block, jnp.zeros_like(rows[experts:]))
        return jnp.concatenate([first, jax.lax.psum(further, AXIS)])

    def apply_per_token(
        self, rows: Float[Array, "G D"], group_expert: Int[Array, " G"], wanted: Bool[Array, " G"] | None = None
    ) -> Float[Array, "G D"]:
        place, is_own = self._place(group_expert)
        return jax.lax.psum(jnp.where(is_own[:, None], super().apply_per_token(rows, place, wanted), 0), AXIS)

    @property
    def _own(self) -> int:
        """Number of the device's experts."""
        return self.w_in[...].shape[0]

    def _place(self, expert: Array) -> tuple[Array, Array]:
        """The place of experts among those of this device, and whether they are there. 0 unless they are."""
        place = expert - jax.lax.axis_index(AXIS) * self._own
        is_own = (place >= 0) & (place < self._own)
        return jnp.where(is_own, place, 0), is_own


class OwnMoE(MoE):
    """The MoE layer of `SampledTransformer` on a mesh with an axis `expert`."""

    experts_type = OwnExperts

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        """A training pass, for a snapshot, drops what the training step on this mesh drops."""
        dispatch = super().dispatch_for(mode, batch, tokens)
        if mode is not Mode.TRAIN or not isinstance(dispatch, Blocks):
            return dispatch
        experts = self.router.shape[-1]
        queues = DeviceQueues.of(self.routing, tokens, experts, jax.lax.axis_size(AXIS))
        return BoundedBlocks(dispatch, queues)
