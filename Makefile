.PHONY: check format lint types test

check: format lint types test  ## what a change must pass before it is committed

format:
	uv run ruff format .

lint:
	uv run ruff check .

types:
	uv run basedpyright

test:
	uv run pytest
