"""How a run trains: on which text (`DataConfig`), by which steps (`TrainConfig`), on which devices (`ExecutionConfig`).

A new corpus needs a name in `NAMED_CORPORA`. `data/corpora.py` says what else it needs. Standard library only.
"""

import os
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.section import Section, no_flag
from moe_jax.system.errors import ConfigError

TokenizerKind = Literal["gpt2", "bpe", "byte", "hf"]
DataFormat = Literal["text", "chat"]
Role = Literal["system", "user", "assistant"]
"""Who speaks in a conversation."""

NAMED_CORPORA = ("stories", "tinystories", "wikitext", "pg19")


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Which text, and how it becomes tokens."""

    source: str = "stories"
    """`stories` (embedded), `tinystories`, `wikitext`, `pg19`, or a file or folder of your own."""
    tokenizer: TokenizerKind = "bpe"
    """`gpt2`, `bpe` (byte-level, trained on the training text), `byte`, or `hf`: the tokenizer of the Hugging Face
    folder in --init-from or --upcycle."""
    vocab_size: int = 1024
    """Entries of a `bpe` tokenizer, the 256 bytes and the separator included."""
    stories: int = no_flag(60_000)
    """Training stories that the embedded corpus generates."""
    stories_seed: ClassVar[int] = 0
    """Seed of the embedded corpus."""
    eval_tokens: int = no_flag(65_536)
    """Most tokens of the validation stream that are scored during training, always the same ones. At the end of a run
    the whole stream is scored."""
    format: DataFormat = no_flag("text")
    """What the files hold: `text`, or with the command `sft` conversations (`chat`), of which only the assistant's
    answers are learned and scored."""

    def __post_init__(self) -> None:
        self.check_choices()
        self.check(bool(self.source.strip()), "source", "a corpus name or a path")
        self.check_range(("vocab_size",), 257, 2**20)
        self.check_range(("stories",), 1, 10**8)
        self.check_range(("eval_tokens",), 2, 65_536)


# Steps

OptimizerKind = Literal["adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon"]
Schedule = Literal["cosine", "linear"]
ParamDtype = Literal["float32", "bfloat16"]

STATE_BYTES: dict[OptimizerKind, float] = {"adamw": 8, "adamw-bf16": 6, "adamw-8bit": 2, "adafactor": 0, "muon": 4}
"""Least bytes of optimizer state for each parameter."""


@dataclass(frozen=True)
class TrainConfig(Section, section="train"):
    """How the model is trained. `training/optimizers/factory.py` makes the optimizer and the schedule from this."""

    steps: int = 1000
    """Optimizer steps of the whole run, and the horizon of the learning-rate schedule."""
    batch_size: int = 16
    """B, sequences of one micro-batch."""
    grad_accum: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    optimizer: OptimizerKind = "adamw"
    """AdamW; AdamW with a bfloat16 first moment, or with 8-bit moments; Adafactor; or Muon for the matrices of the
    blocks and AdamW for the rest."""
    lr: float = 3e-3
    """Peak learning rate of AdamW and Adafactor."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    muon_router: bool = no_flag(False)
    """Train the routers with Muon too. Large AdamW steps move all experts' columns in the direction that all tokens
    share: a fifth of the tokens is then dropped in the first steps. Muon moves all columns by about the same amount, in
    different directions."""
    lr_schedule: Schedule = no_flag("cosine")
    """How the learning rate falls, from the end of the warm-up to the last step. It follows the steps of the run: a
    skipped step does not hold it back."""
    final_lr_ratio: float = no_flag(0.0)
    """Learning rate of the last step, relative to the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up. At most a tenth of the run is used."""
    beta1: float = no_flag(0.9)
    """Decay of the running mean of gradients (first moment), per step."""
    beta2: float = no_flag(0.95)
    """Decay of the running mean of squared gradients (second moment), per step."""
    eps: float = no_flag(1e-8)
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices. Vectors (norms, biases) are not decayed."""
    max_grad_norm: float = no_flag(1.0)
    """Global norm that gradients are clipped to."""
    aux_loss_coef: float = 0.01
    """Weight of the balance loss (1 at perfect balance, can be lower). Unused with `routing.balancing` = bias."""
    router_bias_lr: float = no_flag(1e-3)
    """Amount by which each balance bias changes after a training step, with `routing.balancing` = bias."""
    z_loss_coef: float = no_flag(1e-3)
    """Weight of the router's z-loss."""
    param_dtype: ParamDtype = "float32"
    """Dtype in which matrices are stored between steps. bfloat16 halves the memory of matrices and of their gradients.
    Updated bfloat16 matrices are rounded stochastically: an update smaller than the spacing of bfloat16 still counts on
    average."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data, dropout and samples."""
    log_every: int = no_flag(10)
    """Steps between lines of metrics.jsonl and of the terminal."""
    eval_every: int = 200
    """Steps between evaluations. Each evaluation also writes a sample of text."""
    save_every: int = 200
    """Steps between checkpoints. The last step and the best evaluated step are always saved."""
    patience: int = no_flag(0)
    """Stop early after this many evaluations in a row without improvement. 0 never stops early."""
    lora_rank: int = 0
    """Fine-tuning by low-rank adapters (LoRA): their rank on the attention matrices. Each expert's matrices get
    adapters of rank / top-k, at least 1. The weights of the model stay as they are. 0 trains all weights."""
    lora_alpha: float = no_flag(0.0)
    """Adapters add (alpha / rank) A B to a matrix. 0 is twice the rank."""
    train_router: bool = False
    """With adapters, train the routers too. Without it every expert keeps its tokens, as far as it can."""

    def __post_init__(self) -> None:
        self.check_choices()
        self.check_range(("steps",), 1, 10**9)
        self.check_range(("batch_size", "grad_accum"), 1, 2**16)
        self.check_range(("log_every", "eval_every", "save_every"), 1, 10**9)
        self.check_range(("warmup_steps", "patience"), 0, 10**9)
        self.check_range(("seed",), 0, 2**31 - 1)
        self.check_range(("lora_rank",), 0, 4096)
        self.check_range(("lora_alpha",), 0, 1e6)
        adapted = self.lora_rank > 0
        self.check(adapted or self.lora_alpha == 0, "lora_alpha", "left out; it is for --lora only")
        without = "left out; without --lora the routers are trained"
        self.check(adapted or not self.train_router, "train_router", without)
        self.check_range(("lr", "muon_lr"), 1e-12, 1e3)
        self.check_range(("aux_loss_coef", "router_bias_lr", "z_loss_coef", "weight_decay"), 0, 1e3)
        self.check_range(("final_lr_ratio",), 0, 1)
        self.check_range(("beta1", "beta2"), 0, 0.999999)
        self.check_range(("eps",), 1e-30, 1)
        self.check_range(("max_grad_norm",), 1e-6, 1e9)

    @property
    def lora_scale(self) -> float:
        """alpha / rank, the factor of A B."""
        return (self.lora_alpha or 2 * self.lora_rank) / self.lora_rank


# Precision, memory, devices and processes. A resumed run may change every field

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Fit = Literal["auto", "any", "off"]

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]i?)B", re.IGNORECASE)

MESH_FORM = "axes data, fsdp and expert, each at most once with a size of 1 to 65,536, such as data=2,expert=4"


@dataclass(frozen=True)
class ExecutionConfig(Section, section="execution"):
    """How a model is computed. The function that it computes stays the same, up to rounding."""

    compute_dtype: ComputeDtype = "auto"
    """Precision of activations and matrix products. `auto` chooses from the device and says why."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
    deterministic: bool = False
    """On a GPU, use only programs that give the same bits each time, at some cost in speed. A CPU always does."""
    mesh: str = ""
    """Devices that train together, as AXIS=SIZE,...: `data` divides the batch, `fsdp` also the matrices, `expert` also
    the experts. The sizes multiply to the number of devices. Without it, one device."""
    fit: Fit = "auto"
    """What may change so that the run fits the memory of its device: `auto` remat and the size of the micro-batch, with
    as many sequences a step; `any` also the optimizer, to a leaner one, which trains differently; `off` nothing."""
    memory: str = ""
    """Memory that the run may take, such as 700MB or 3.5GiB. Without it, what a GPU has free; a CPU has no limit."""

    def __post_init__(self) -> None:
        self.check_choices()
        devices = MeshShape.parse(self.mesh).devices
        self.check(not self.memory or self.memory_bytes > 0, "memory", "a size such as 700MB or 3.5GiB")
        self.check(not self.memory or devices == 1, "memory", "left out with --mesh; it is for one device")

    @property
    def fitted(self) -> bool:
        """Whether the run may be changed to fit its device. A mesh of several devices is taken as it is."""
        return self.fit != "off" and MeshShape.parse(self.mesh).devices == 1

    @property
    def memory_bytes(self) -> float:
        """Bytes of `memory`; 0 unless it is a size."""
        size = _SIZE.fullmatch(self.memory)
        if size is None:
            return 0.0
        unit = size[2].upper()
        return float(size[1]) * (1024 if unit.endswith("I") else 1000) ** ("KMGT".index(unit[0]) + 1)

    def check_mesh(self, model: ModelConfig, train: TrainConfig) -> None:
        """Raise ConfigError unless the model and the batch can be divided over the mesh."""
        shape = MeshShape.parse(self.mesh)
        if train.batch_size % shape.devices:
            problem = f"{shape.devices} devices; --batch-size {train.batch_size} is not a multiple of {shape.devices}"
            raise self.wrong("mesh", problem)
        divides = model.width % shape.fsdp == 0
        self.check(divides, "mesh", f"an fsdp axis that divides --model.width {model.width} evenly")
        if shape.expert > 1:
            allowed = f"without an expert axis: --model.dense {model.dense} has no experts to divide"
            self.check(model.dense == "none", "mesh", allowed)
            divides = model.experts % shape.expert == 0
            self.check(divides, "mesh", f"an expert axis that divides --experts {model.experts} evenly")


class MeshShape(NamedTuple):
    """How many devices lie along each axis of a mesh. The sequences of a batch are divided over all axes."""

    data: int = 1
    """Devices along this axis hold the same parameters."""
    fsdp: int = 1
    """Devices along this axis each hold a part of every matrix, divided along the model width D."""
    expert: int = 1
    """Devices along this axis each hold some of the experts. Tokens travel to them."""

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.expert

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """The shape that a text such as "data=2,expert=4" names. An empty text is one device.

        Raises ConfigError if the text is not of this form.
        """
        sizes: dict[str, int] = {}
        for part in text.split(",") if text else ():
            axis, _, size = part.partition("=")
            known = axis in cls._fields and axis not in sizes
            if not (known and size.isascii() and size.isdigit() and len(size) <= 5 and 1 <= int(size) <= 2**16):
                raise ConfigError(f"--mesh {text}: must be {MESH_FORM}")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = [f"{axis} {size}" for axis, size in zip(self._fields, self, strict=True) if size > 1]
        return " x ".join(sizes) or "one device"


@dataclass(frozen=True)
class ProcessGroup:
    """The place of this process in a group of processes. Process 0 is the coordinator, which the others call."""

    count: int
    index: int
    coordinator: str
    """host:port of process 0."""
    detected: bool = False
    """Whether jax asks the cluster for the other three (SLURM, Kubernetes, Open MPI, TPU)."""

    @classmethod
    def of(cls, count: int | None, index: int | None, coordinator: str) -> "ProcessGroup | None":
        """The group that the flags name. None for a process that trains alone. Raises ConfigError.

        Without an address, JAX_COORDINATOR_ADDRESS is read, as jax itself does.
        """
        if coordinator == "cluster":
            if count is not None or index is not None:
                raise ConfigError(
                    "--coordinator-address cluster: the cluster says the number of processes and the id; leave out "
                    "--num-processes and --process-id"
                )
            return cls(0, 0, "", detected=True)
        if count is None:
            if index is None and not coordinator:
                return None
            flag = f"--coordinator-address {coordinator}" if index is None else f"--process-id {index}"
            raise ConfigError(f"{flag}: needs --num-processes, the number of processes that train together")
        if not 1 <= count <= 2**16:
            raise ConfigError(f"--num-processes {count}: must be between 1 and {2**16:,}")
        if count == 1:
            return None
        if index is None or not 0 <= index < count:
            what = ": must be given," if index is None else f" {index}: must be"
            raise ConfigError(f"--process-id{what} between 0 and {count - 1} for --num-processes {count}")
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) < 2**16):
            raise ConfigError(
                f"--coordinator-address {coordinator}: must be HOST:PORT of process 0, such as 127.0.0.1:9876"
            )
        return cls(count, index, coordinator)

    @property
    def local(self) -> bool:
        """Whether all processes run on this machine."""
        return self.coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
