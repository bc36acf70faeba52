"""`moe-jax export`."""

import os
import shlex
from pathlib import Path

from moe_jax.cli.options import RunName, StepNumber, check_out_file, check_out_folder, checked_run, starting
from moe_jax.config import ConfigError
from moe_jax.interop.architectures import ExportDtype, ExportTarget
from moe_jax.runs.catalog import title


def export(
    out: str,
    run: RunName = "",
    step: StepNumber = None,
    to: ExportTarget = "hf",
    dtype: ExportDtype = "float32",
) -> int:
    """Write a trained model for transformers, llama.cpp or ollama, or as a page that runs it.

    The checkpoint is verified first. The folder has the weights, the tokenizer, and a model card made of the run's
    summary. The page is one file. An error leaves no partial folder or page.

    Args:
        out: The folder to make; for `html` the file.
        to: For transformers (`hf`), llama.cpp and ollama (`gguf`), `both`; plain `safetensors` with a stated layout; or
            `html`, a page with the model inside, to open in a browser.
        dtype: Number format of the weights. q8_0 has 8 bits a weight; for `gguf` only. A page has int8.
    """
    folder, path = checked_run(run, step), Path(out)
    if to == "html":
        _check_page(path, dtype)
    else:
        check_out_folder("--out", path, new=True)
        if dtype == "q8_0" and to != "gguf":
            raise ConfigError(f"--dtype q8_0: for --to gguf only, and --to is {to}; use bfloat16")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and a card may be busy with training
    with starting(f"exporting {title(folder)}"):
        if to == "html":
            from moe_jax.interop.html import write_html

            write_html(folder, path, step)
            files = [path]
        else:
            from moe_jax.interop.export import export as export_files
            from moe_jax.interop.source import open_source

            command = f"python -m moe_jax export --run {shlex.quote(str(folder))} --to {to} --dtype {dtype}"
            files = export_files(open_source(folder, step), to, dtype, path, command)
    for file in files:
        print(f"{file.stat().st_size / 1e3:12,.1f} kB  {file}")
    if to in ("gguf", "both"):
        name = shlex.quote(folder.resolve().name)
        print(f"next: ollama create {name} -f {shlex.quote(str(path / 'Modelfile'))}")
    elif to == "hf":
        print(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})")
    elif to == "html":
        print("next: open it in a browser")
    return 0


def _check_page(path: Path, dtype: str) -> None:
    check_out_file("--out", path)
    if path.exists():
        raise ConfigError(f"--out {path}: is there already; name a new file")
    if dtype != "float32":
        raise ConfigError(f"--dtype {dtype}: the weights of a page are int8; leave it out")
