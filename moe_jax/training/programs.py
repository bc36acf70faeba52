"""All programs that a run executes on a device. Sessions, plans, certificates and benchmarks get them from here.

The programs are built from a configuration and a device. The device may also be a description of a GPU that this
machine does not have. A program is built when it is first used, and compiled when it is first called.
"""

import dataclasses
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
from moe_jax.model.kernels.library_attention import AttentionForm, choose_attention
from moe_jax.model.low_rank import Adapters, LoraShape, initial_adapters, merged
from moe_jax.model.moe.layer import MoE
from moe_jax.model.precision import Card, Policy, choose_policy, cpu_bfloat16_units, writing_policy
from moe_jax.model.transformer import Forms, Params, abstract_adapted, abstract_model
from moe_jax.parallel.experts import ExpertParallelMoE
from moe_jax.parallel.layout import Layout
from moe_jax.parallel.processes import place
from moe_jax.system.random_keys import Purpose, purpose_key
from moe_jax.training.evaluate import EvaluationStep, Tracer, make_evaluation_step, make_tracer
from moe_jax.training.optimizers.factory import make_optimizer, needs_whole_matrices
from moe_jax.training.state import TrainState, initial_params, initial_state
from moe_jax.training.step import Step, make_step


@dataclass(frozen=True)
class Programs:
    """The programs of one configuration, whose vocabulary size is known."""

    config: RunConfig
    policy: Policy
    device: Any
    """The device that was given, if any."""
    graphdef: nnx.GraphDef
    """The definition of the plain model, which is evaluated."""
    trained_graphdef: nnx.GraphDef
    """The definition of the model that is trained: with adapters, if there are any, and with the forms of a card and of
    a mesh."""
    param_shapes: Params
    """Shapes and dtypes of the parameters, as they are stored."""
    adapter_shapes: Adapters | None
    lora: LoraShape | None
    """The size of the adapters, if only adapters are trained."""
    attention: AttentionForm
    """The form of attention in training."""
    optimizer: optax.GradientTransformationExtraArgs
    layout: Layout | None = None
    """Where arrays lie on the mesh of several devices. None on one device."""

    @classmethod
    def of(
        cls, config: RunConfig, device: Any = None, mesh: Mesh | None = None, kept_precision: str = ""
    ) -> "Programs":
        """The programs for a device, or for a description of one that `precision.Card.of` takes. Unless given, for the
        first device of this machine. With a `mesh`, step and evaluation are for all its devices together.

        `kept_precision` is that of a resumed run (`choose_policy`).
        """
        model, train, execution = config.model, config.train, config.execution
        policy = choose_policy(execution.compute_dtype, device, kept_precision)
        plain = Forms(policy.compute, execution.remat)
        graphdef, shapes = abstract_model(model, plain, train.param_dtype)
        card = Card.of(device or jax.devices()[0])
        here = device is None or isinstance(device, jax.Device)
        devices = 1 if mesh is None else mesh.size
        attention = choose_attention(model, execution, policy.compute, card, here, train.batch_size, devices)
        lora, adapters = LoraShape.of(train), None
        moe = MoE if mesh is None or mesh.shape["expert"] == 1 else ExpertParallelMoE
        forms = dataclasses.replace(plain, moe=moe, attention=attention.implementation)
        if lora is None:
            trained, _ = abstract_model(model, forms, train.param_dtype)
        else:
            trained, adapters = abstract_adapted(model, lora, forms)
        whole = needs_whole_matrices(shapes if adapters is None else adapters, train)
        layout = None if mesh is None else Layout.of(mesh, shapes, whole, adapters)
        return cls(
            config=config,
            policy=policy,
            device=device,
            graphdef=graphdef,
            trained_graphdef=trained,
            param_shapes=shapes,
            adapter_shapes=adapters,
            lora=lora,
            attention=attention,
            optimizer=_optimizer(config, policy, card, layout),
            layout=layout,
        )

    @cached_property
    def writer(self) -> nnx.GraphDef:
        """The definition of the model that writes samples, token by token, in a precision of its own
        (`writing_policy`)."""
        writing = writing_policy(self.config.execution.compute_dtype, self.device)
        return abstract_model(self.config.model, Forms(writing.compute, self.config.execution.remat))[0]

    @cached_property
    def state_shapes(self) -> TrainState:
        """Shapes and dtypes of the whole training state, and on a mesh where its arrays lie."""
        shapes = jax.eval_shape(self._initial_state, self.param_shapes)
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
        """The state of training before the first step. On a mesh the parameters are moved to their places, and each
        device makes its own parts of the rest."""
        if self.layout is None:
            return self._initial_state(params)
        return self.placed_state(jax.tree.map(place, params, self.param_places))

    @cached_property
    def placed_state(self) -> Callable[[Params], TrainState]:
        """(parameters) -> the state before the first step on a mesh, which takes over their memory."""
        assert self.layout is not None
        places = self.layout.state(jax.eval_shape(self._initial_state, self.param_shapes))
        return jax.jit(self._initial_state, out_shardings=places, donate_argnums=0)

    @property
    def param_places(self) -> Any:
        """The shardings of the parameters on the mesh."""
        assert self.layout is not None
        return self.layout.shardings(self.param_shapes, self.layout.params)

    def _initial_state(self, params: Params) -> TrainState:
        key = purpose_key(self.config.train.seed, Purpose.ADAPTERS)
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
        scaling, shapes = self.policy.loss_scaling, self.state_shapes
        return make_step(self.trained_graphdef, self.optimizer, self.config.train, scaling, self.layout, shapes)

    @cached_property
    def evaluation(self) -> EvaluationStep:
        """One batch of evaluation windows; see `evaluate.make_evaluation_step`."""
        return make_evaluation_step(self.graphdef, self.layout)

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
        return (lambda function: function) if self.layout is None else self.layout.same_on_all_devices

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


def _optimizer(
    config: RunConfig, policy: Policy, card: Card, layout: Layout | None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run. Where bfloat16 is multiplied fast, Muon does so too."""
    on_cpu = card.platform == "cpu"
    narrow = policy.compute == "bfloat16" and bool(cpu_bfloat16_units() if on_cpu else card.bfloat16_units)
    constrain = {} if layout is None else {"constrain": layout.constrain}
    return make_optimizer(config.train, **constrain, narrow=narrow, stacked=narrow and on_cpu and layout is None)
