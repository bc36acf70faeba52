"""Sphinx's settings. `book/build.py` puts the sources together and starts Sphinx."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "A mixture of experts, by hand and compiled"
author = copyright = "its contributors"
html_title = project
language = "en"

extensions = ["myst_nb", "autodoc2", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}
_ORIGIN = subprocess.run(
    ["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True
).stdout.strip()
REPOSITORY = os.environ.get("MOE_JAX_REPOSITORY", _ORIGIN if _ORIGIN.startswith("https://") else "").removesuffix(
    ".git"
)
"""Public address of the repository, such as https://github.com/owner/name. Without it no page has a Colab button."""
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
html_static_path = [str(ROOT / "book" / "static")]
html_css_files = ["book.css"]
html_show_sourcelink = html_copy_source = False

nb_execution_mode = "off"  # the notebooks come with their outputs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
highlight_language = "none"  # a block without a language is a command or an output

autodoc2_packages = [
    {"path": str(Path("../../..") / name), "exclude_dirs": ["__pycache__", "notebooks"]}
    for name in ("foundation", "moe_jax")
]
autodoc2_output_dir = "reference"
autodoc2_render_plugin = "myst"
autodoc2_docstring_parser_regexes = [(".*", "myst")]
autodoc2_skip_module_regexes = [r".*\.__main__"]
autodoc2_hidden_objects = {"dunder", "private", "inherited"}
autodoc2_sort_names = True
autodoc2_index_template = None
autodoc2_replace_annotations = [
    (f"jaxtyping.{name}", name)
    for name in ("Array", "Bool", "Float", "Int", "Integer", "Key", "Num", "Shaped", "UInt8")
]
suppress_warnings = ["ref.python"]  # a type such as `bytes` is the name of several fields too
