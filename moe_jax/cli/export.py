"""`moe-jax export`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from moe_jax.cli.checks import check_new_folder
from moe_jax.cli.command import Command, check_run_folder
from moe_jax.config import ConfigError
from moe_jax.system import environment
from moe_jax.system.terminal import working


@dataclass(frozen=True)
class Export(Command):
    """Write a trained model for transformers, llama.cpp or ollama.

    The checkpoint is verified first. The folder has the weights, the tokenizer, and a model card made of the run's
    summary. It is whole or absent.
    """

    interrupted: ClassVar[str] = "nothing was exported"

    run: str
    """Folder of a run."""
    out: str
    """The folder to make."""
    to: Literal["hf", "gguf", "both", "safetensors"] = "hf"
    """For transformers (`hf`), llama.cpp and ollama (`gguf`), `both`; or plain `safetensors` with a stated layout."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Of the weights. q8_0 has 8 bits a weight; for `gguf` only."""
    step: int | None = None
    """Step of the checkpoint to export. The best one unless given."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        check_new_folder("--out", self.out)
        out = Path(self.out)
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ConfigError(f"--dtype q8_0: for --to gguf only, and --to is {self.to}; use bfloat16")
        environment.prepare_environment()
        with working(f"exporting {self.run}"):
            from moe_jax.interop.export import export
            from moe_jax.interop.source import open_source

            command = f"python -m moe_jax export --run {shlex.quote(self.run)} --to {self.to} --dtype {self.dtype}"
            source = open_source(Path(self.run), self.step)
            files = export(source, self.to, self.dtype, out, command)
        for file in files:
            print(f"{file.stat().st_size / 1e3:12,.1f} kB  {file}")
        if self.to in ("gguf", "both"):
            name = shlex.quote(Path(self.run).resolve().name)
            print(f"next: ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}")
        elif self.to == "hf":
            print(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
        return 0
