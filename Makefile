.PHONY: check format lint types test book

check: lint types test  ## for each commit; .ci/run is for each merge

format:
	uv run --group lint ruff format .

lint:
	uv run --group lint ruff format --check .
	uv run --group lint ruff check .

types:
	uv run --group types --extra plots --extra lessons --extra gguf --extra serve --group tasks basedpyright

test:
	uv run --extra plots --extra serve pytest

book:  ## all pages, notebooks and docstrings as one book, in book/build/html
	uv run --group book python -m book.build
