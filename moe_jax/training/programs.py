"""All programs that a run executes on a device. Sessions, plans, certificates and benchmarks get them from here.

The programs are built from a configuration and a device. The device may also be a description of a GPU that this
machine does not have. A program is built when it is first used, and compiled when it is first called.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Key

from moe_jax.config import RunConfig
from moe_jax.data.batches import MaskedBatch
from moe_jax.inference.decode import Decoder
from moe_jax.inference.traced_pass import ShardMapWrapper
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.kernels.library_attention import AttentionForm, choose_attention
from moe_jax.model.low_rank import Adapters, LoraShape, initial_adapters, merged
from moe_jax.model.moe.layer import MoE
from moe_jax.model.precision import Card, Policy, choose_policy, cpu_bfloat16_units, writing_policy
from moe_jax.model.transformer import Params, abstract_adapted, abstract_model
from moe_jax.parallel.experts import ExpertParallelMoE
from moe_jax.parallel.layout import Layout
from moe_jax.parallel.processes import place
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.evaluate import EvaluationStep, Tracer, make_evaluation_step, make_tracer
from moe_jax.training.on_mesh import make_mesh_evaluation, mesh_gradients, same_on_all_devices
from moe_jax.training.optimizers.factory import make_optimizer, needs_whole_matrices
from moe_jax.training.state import TrainState, initial_params, initial_state
from moe_jax.training.step import Gradients, MeshPrograms, Step, gradients, make_step


@dataclass(frozen=True)
class Programs:
    """The programs of one configuration, whose vocabulary size is known."""

    config: RunConfig
    policy: Policy
    graphdef: nnx.GraphDef
    writer: nnx.GraphDef
    """The definition of the model that writes samples, token by token (`writing_policy`)."""
    param_shapes: Params
    """Shapes and dtypes of the parameters, as they are stored."""
    optimizer: optax.GradientTransformationExtraArgs
    lora: LoraShape | None
    """The size of the adapters, if only adapters are trained."""
    training_graphdef: nnx.GraphDef
    """The definition of the model that is trained: with adapters, if there are any, and with the forms of a card."""
    attention: AttentionForm
    """The form of attention in training."""
    adapter_shapes: Adapters | None
    layout: Layout | None = None
    """Where arrays lie on the mesh of several devices. None on one device."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        device: Any = None,
        mesh: Mesh | None = None,
        kept_precision: str = "",
    ) -> "Programs":
        """The programs for a device, or for what describes a card (`precision.Card.of`). Unless given, for the
        first device of this machine. With a `mesh`, step and evaluation are for all its devices together.

        `kept_precision` is that of a resumed run (`choose_policy`).
        """
        dtype, remat = config.execution.compute_dtype, config.execution.remat
        policy, writing = choose_policy(dtype, device, kept_precision), writing_policy(dtype, device)
        stored = config.train.param_dtype, remat
        graphdef, shapes = abstract_model(config.model, policy.compute, *stored)
        writer, _ = abstract_model(config.model, writing.compute, *stored)
        trained_moe = ExpertParallelMoE if mesh is not None and mesh.shape["expert"] > 1 else MoE
        lora, training, adapters = LoraShape.of(config.train), graphdef, None
        card = Card.of(device or jax.devices()[0])
        here = device is None or isinstance(device, jax.Device)
        devices = 1 if mesh is None else mesh.size
        attention = choose_attention(config.model, config.execution, policy.compute, card, here, devices)
        form = attention.implementation
        if lora is not None:
            training, adapters = abstract_adapted(config.model, lora, policy.compute, remat, trained_moe, form)
        elif trained_moe is not MoE or form is not None:
            training, _ = abstract_model(config.model, policy.compute, *stored, trained_moe, attention=form)
        layout = None
        if mesh is not None:
            whole = needs_whole_matrices(shapes if adapters is None else adapters, config.train)
            layout = Layout.of(mesh, shapes, whole, adapters)
        # Where bfloat16 is multiplied fast, Muon does so too.
        on_cpu = card.platform == "cpu"
        narrow = policy.compute == "bfloat16" and bool(cpu_bfloat16_units() if on_cpu else card.bfloat16_units)
        constrain = {} if layout is None else {"constrain": layout.constrain}
        stacked = narrow and on_cpu and layout is None
        optimizer = make_optimizer(config.train, **constrain, narrow=narrow, stacked=stacked)
        definitions = graphdef, writer, shapes, optimizer, lora, training, attention
        return cls(config, policy, *definitions, adapters, layout)

    @cached_property
    def state_shapes(self) -> TrainState:
        """Shapes and dtypes of the whole training state, and on a mesh where its arrays lie."""
        shapes = jax.eval_shape(lambda p: self._initial_state(p, self._adapter_key), self.param_shapes)
        if self.layout is None:
            return shapes
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            self.layout.state(shapes),
        )

    @cached_property
    def initialiser(self) -> Callable[[Key[Array, ""]], Params]:
        """(key) -> random parameters. On a mesh each device makes its own parts of them, and no other."""
        make = partial(initial_params, self.config)
        return make if self.layout is None else jax.jit(make, out_shardings=self.param_places)

    def initial_params(self) -> Params:
        """Random parameters, from the seed of the configuration. On a mesh they have the bits of one device."""
        return self.initialiser(purpose_key(self.config.train.seed, Purpose.INITIAL_PARAMETERS))

    def state(self, params: Params) -> TrainState:
        """The state of training before the first step. On a mesh each device makes its own parts, and the parameters
        are moved to their places if they lie elsewhere."""
        if self.layout is None:
            return self._initial_state(params, self._adapter_key)
        params = jax.tree.map(place, params, self.param_places)
        return dataclasses.replace(self.rest_of_state(params, self._adapter_key), params=params)

    @cached_property
    def rest_of_state(self) -> Callable[[Params, Key[Array, ""]], TrainState]:
        """(parameters, key of the adapters) -> the state before the first step on a mesh, without the parameters."""
        assert self.layout is not None

        def rest(params: Params, key: Key[Array, ""]) -> TrainState:
            return dataclasses.replace(self._initial_state(params, key), params={})

        shapes = jax.eval_shape(rest, self.param_shapes, self._adapter_key)
        return jax.jit(rest, out_shardings=self.layout.state(shapes))

    @property
    def _adapter_key(self) -> Key[Array, ""]:
        return purpose_key(self.config.train.seed, Purpose.ADAPTERS)

    @property
    def param_places(self) -> Any:
        """The shardings of the parameters on the mesh."""
        assert self.layout is not None
        return self.layout.shardings(self.param_shapes, self.layout.params)

    def _initial_state(self, params: Params, key: Key[Array, ""]) -> TrainState:
        adapters = None if self.adapter_shapes is None else initial_adapters(self.adapter_shapes, key)
        return initial_state(params, self.optimizer, self.policy.loss_scaling, adapters)

    def weights(self, state: TrainState) -> Params:
        """The parameters of the plain model, for evaluation and decoding: adapters are merged into them. On a mesh
        every device gets all of them."""
        return self._plain(state.params, state.adapters)

    @cached_property
    def _plain(self) -> Callable[[Params, Adapters | None], Params]:
        def plain(params: Params, adapters: Adapters | None) -> Params:
            return params if adapters is None or self.lora is None else merged(params, adapters, self.lora.scale)

        return plain if self.layout is None else jax.jit(plain, out_shardings=self.layout.sharding(PartitionSpec()))

    @cached_property
    def step(self) -> Step:
        """(state, batch int32 [M, B, T+1]) -> (state, report). The new state reuses the memory of the given state."""
        layout, mesh = self.layout, None
        if layout is not None:
            mesh = MeshPrograms(self.gradients, layout.state(self.state_shapes), layout.sharding(layout.batch))
        train, scaling = self.config.train, self.policy.loss_scaling
        return make_step(self.training_graphdef, self.optimizer, train, scaling, mesh=mesh)

    @property
    def gradients(self) -> Gradients:
        """The gradient of the training step: `step.gradients`, or what a mesh has in its place."""
        return gradients if self.layout is None else partial(mesh_gradients, self.layout)

    @cached_property
    def evaluation(self) -> EvaluationStep:
        """One batch of evaluation windows; see `evaluate.make_evaluation_step`."""
        one = make_evaluation_step(self.graphdef)
        return one if self.layout is None else make_mesh_evaluation(self.layout, one)

    def decoder(self, vocab_size: int | None = None) -> Decoder:
        """Prefill and decoding of one sequence. Only the first `vocab_size` tokens are drawn (all unless given)."""
        model = self.config.model
        return Decoder(self.writer, model.seq_len, vocab_size or model.vocab_size, spread=self._spread)

    def tracer(self, tokens: np.ndarray) -> Tracer | None:
        """What records the routing of the first tokens of a stream (`evaluate.make_tracer`)."""
        return make_tracer(self.config.model, self.graphdef, tokens, self._spread)

    @property
    def _spread(self) -> ShardMapWrapper:
        """What makes a function a program of all devices of the mesh, which compute it alike."""
        if self.layout is None:
            return lambda function: function
        return same_on_all_devices(self.layout)

    def compiled_step(self, batch_size: int, micro_batches: int = 1) -> Any:
        """The step, compiled for micro-batches of `batch_size` sequences, but not run."""
        lower = self.step.lower  # pyright: ignore[reportFunctionMemberAccess]
        return lower(self.state_shapes, self.batch_shapes(batch_size, micro_batches)).compile()

    def batch_shapes(self, batch_size: int, micro_batches: int = 1) -> Any:
        """The shapes of a batch of the step: tokens, and weights if the data are conversations."""
        rows, length = (micro_batches, batch_size), self.config.model.seq_len
        tokens = jax.ShapeDtypeStruct((*rows, length + 1), jnp.int32)
        if self.config.data.format == "text":
            return tokens
        return MaskedBatch(tokens, jax.ShapeDtypeStruct((*rows, length), jnp.float32))  # pyright: ignore[reportArgumentType]


@dataclass
class RandomTokenTrainer:
    """A training step on random tokens, for benchmarks in which the text does not matter.

    It is called without arguments. Each call continues from the state of the last.
    """

    config: RunConfig
    step: Step
    state: TrainState
    batch: np.ndarray

    @classmethod
    def of(cls, config: RunConfig, batch_size: int, micro_batches: int = 1) -> "RandomTokenTrainer":
        programs = Programs.of(config)
        state = programs.state(initial_params(config, jax.random.key(0)))
        shape = (micro_batches, batch_size, config.model.seq_len + 1)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
        return cls(config, programs.step, state, tokens)

    def __call__(self) -> Any:
        self.state, report = self.step(self.state, self.batch)
        return report

    @property
    def active_flops(self) -> float:
        """Floating-point operations of one call: 6 x active matmul parameters x tokens."""
        tokens = math.prod(self.batch.shape[:2]) * self.config.model.seq_len
        return 6.0 * totals(count_parameters(self.config.model)).multiplied * tokens
