"""`moe-jax export` and `quantize`: a trained run in another form."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.cli.command import ModelCommand, check_new_folder, check_out_file, check_whole_folder, print_json
from moe_jax.config import ConfigError
from moe_jax.interop.architectures import ExportDtype, ExportTarget
from moe_jax.system import environment
from moe_jax.system.terminal import say, working


@dataclass(frozen=True, kw_only=True)
class Export(ModelCommand):
    """Write a trained model for transformers, llama.cpp or ollama, or as a page that runs it.

    The checkpoint is verified first. The folder has the weights, the tokenizer, and a model card made of the run's
    summary. The page is one file. An error leaves no partial folder or page.
    """

    out: str
    """The folder to make; for `html` the file."""
    to: ExportTarget = "hf"
    """For transformers (`hf`), llama.cpp and ollama (`gguf`), `both`; plain `safetensors` with a stated layout; or
    `html`, a page with the model inside, to open in a browser."""
    dtype: ExportDtype = "float32"
    """Number format of the weights. q8_0 has 8 bits a weight; for `gguf` only. A page has int8."""

    def execute(self) -> int:
        self.check()
        if self.to == "html":
            return self._page(Path(self.out))
        out = Path(self.out)
        check_whole_folder("--out", out)
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ConfigError(f"--dtype q8_0: for --to gguf only, and --to is {self.to}; use bfloat16")
        os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and a card may be busy with training
        environment.prepare_environment()
        with working(f"exporting {self.name}"):
            from moe_jax.interop.export import export
            from moe_jax.interop.source import open_source

            command = f"python -m moe_jax export --run {shlex.quote(self.run)} --to {self.to} --dtype {self.dtype}"
            files = export(open_source(Path(self.run), self.step), self.to, self.dtype, out, command)
        for file in files:
            print(f"{file.stat().st_size / 1e3:12,.1f} kB  {file}")
        if self.to in ("gguf", "both"):
            name = shlex.quote(Path(self.run).resolve().name)
            print(f"next: ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}")
        elif self.to == "hf":
            print(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
        return 0

    def _page(self, out: Path) -> int:
        check_out_file("--out", out)
        if os.path.lexists(out):
            raise ConfigError(f"--out {out}: is there already; name a new file")
        if self.dtype != "float32":
            raise ConfigError(f"--dtype {self.dtype}: the weights of a page are int8; leave it out")
        os.environ["JAX_PLATFORMS"] = "cpu"
        environment.prepare_environment()
        with working(f"exporting {self.name}"):
            from moe_jax.interop.html import write_html

            write_html(Path(self.run), out, self.step)
        print(f"{out.stat().st_size / 1e3:12,.1f} kB  {out}\nnext: open it in a browser")
        return 0


@dataclass(frozen=True, kw_only=True)
class Quantize(ModelCommand):
    """Write a trained run with 8 or 4 bits a weight: smaller, and faster to decode.

    The validation text is scored before and after. The new run opens like any other, but it cannot be trained or
    exported. Activations stay as they are.

    The last line of the output is JSON if it is asked for, or if the output is a file or a pipe.
    """

    to: Literal["int8", "int4"]
    """int8: one scale for each output of a matrix. int4: one scale for each output and 32 inputs."""
    out: str = ""
    """The folder of the new run. Empty: the name of the run, with -int8 or -int4."""
    json: bool = False
    """Print the result as JSON too."""

    def execute(self) -> int:
        self.check()
        run = Path(self.run)
        out = Path(self.out) if self.out else run.with_name(f"{run.resolve().name}-{self.to}")
        check_new_folder("--out", out)
        environment.prepare_environment()
        with working(f"loading {self.name}"):
            from moe_jax.training.quantize import quantize_run
        made = quantize_run(run, self.to, out, self.step)
        say(f"{made.checkpoint}: {self.to}")
        say(f"weights: {made.bytes_before / 1e6:,.2f} MB before, {made.bytes_after / 1e6:,.2f} MB after")
        result = {"bytes_before": made.bytes_before, "bytes_after": made.bytes_after}
        if made.before is None or made.after is None:
            say(f"not scored: {made.not_scored}")
        else:
            more = made.after.loss / made.before.loss - 1
            say(f"bits per byte: {made.before.bits_per_byte:.4f} before, {made.after.bits_per_byte:.4f} after")
            say(f"loss: {made.before.loss:.4f} before, {made.after.loss:.4f} after ({more:+.2%})")
            for name, scored in (("before", made.before), ("after", made.after)):
                result |= {f"val_loss_{name}": scored.loss, f"val_bits_per_byte_{name}": scored.bits_per_byte}
        print(f"next: uv run python -m moe_jax chat --run {shlex.quote(str(out))}")
        print_json(result, self.json)
        return 0
