"""`python foundation/notebooks/build.py [--check] [NAME...]`: builds the notebooks.

These are the notebooks beside this file, and those of `notebooks/`, which look into a
trained model (foundation itself imports nothing of it).

The percent-format .py files are the source. Each is executed in a fresh kernel and
written as .ipynb with its outputs. `--check` executes all and writes nothing; it exits
1 where a built notebook's source differs from its .py file.
"""

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def sources() -> list[Path]:
    """The chapters in order: they start with their number."""
    return sorted(
        [*HERE.glob("[0-9]*.py"), *(ROOT / "notebooks").glob("[0-9]*.py")],
        key=lambda path: path.name,
    )


def execute(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, executed from the root of the repository.

    Raises CellExecutionError where a cell does.
    """
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"}
    )
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"  # random otherwise, and every build would differ
    return notebook


def differs(source: Path) -> bool:
    """Whether the built notebook is missing or holds other cells than its source."""
    built = source.with_suffix(".ipynb")
    if not built.exists():
        return True
    cells = [
        [(c.cell_type, c.source) for c in book.cells]
        for book in (jupytext.read(source), nbformat.read(built, 4))
    ]
    return cells[0] != cells[1]


def main(argv: list[str] | None = None) -> int:
    """Builds or checks every chapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="only chapters whose name begins so, as 07",
    )
    arguments = parser.parse_args(argv)
    names = [source.name for source in sources()]
    for wrong in arguments.names:
        if not any(name.startswith(wrong) for name in names):
            parser.error(f"NAME {wrong}: no chapter begins so; take two digits, as 07")
    stale = []
    for source in (
        s for s in sources() if s.name.startswith(tuple(arguments.names) or "")
    ):
        print(source.name, flush=True)
        notebook = execute(source)
        if arguments.check:
            stale += [source.name] if differs(source) else []
        else:
            nbformat.write(notebook, source.with_suffix(".ipynb"))
    if stale:
        print(
            "built from another source, run this without --check: " + ", ".join(stale)
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
