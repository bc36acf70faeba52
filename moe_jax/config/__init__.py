"""The settings of a run: frozen, validated dataclasses.

The modules here import only the standard library, and modules of `system` that do so too. So a wrong value is reported
before jax is imported. A wrong value raises `ConfigError`, whose text names the flag, the value and what is allowed.

    model.py       ModelConfig, RoutingConfig: the shape, the routing policy, the capacity rule
    rope.py        the scaled rotations of public models
    train.py       DataConfig, TrainConfig: the text, the steps
    execution.py   ExecutionConfig: precision, memory, devices; MeshShape, ProcessGroup
    sampling.py    SamplingConfig: how text is drawn
    run.py         RunConfig: all of them, to and from the `config.json` of a run's folder
    presets.py     the presets: named settings that a run starts from
    section.py     the marks on fields (short flags, what a run keeps, limits), and the checks that name them

The alphabet of the project, used in every annotation, einsum and comment:

    B batch    T positions    D model width    H heads    A width of a head    L layers    V vocabulary
    KV heads of the keys and values
    E experts  K experts per token             C capacity of an expert         F hidden width of an expert
"""

from moe_jax.config.execution import ComputeDtype, ExecutionConfig, MeshShape, ProcessGroup
from moe_jax.config.model import (
    Activation,
    Dense,
    ModelConfig,
    Norm,
    QKNorm,
    RoutingConfig,
    capacity,
)
from moe_jax.config.run import SECTIONS, PresetName, RunConfig
from moe_jax.config.train import (
    NAMED_CORPORA,
    DataConfig,
    DataFormat,
    OptimizerKind,
    ParamDtype,
    Role,
    TrainConfig,
)
from moe_jax.system.errors import ConfigError, UserError
