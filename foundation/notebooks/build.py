"""`python foundation/notebooks/build.py [NAME...]`: builds the notebooks.

These are the notebooks beside this file, and those of `notebooks/`, which look into a
trained model (foundation itself imports nothing of it).

The percent-format .py files are the source. Each is executed in a fresh kernel and
written as .ipynb with its outputs.
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
    """Builds the chapters whose names begin so, or every one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="two digits, as 07")
    names = tuple(parser.parse_args(argv).names)
    for wrong in names:
        if not any(source.name.startswith(wrong) for source in sources()):
            parser.error(f"NAME {wrong}: no chapter begins so; take two digits, as 07")
    for source in sources():
        if source.name.startswith(names or ""):
            print(source.name, flush=True)
            nbformat.write(execute(source), source.with_suffix(".ipynb"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
