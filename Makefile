.PHONY: check format lint types test night site

check: lint types test  ## for each commit; .ci/run is for each merge

format:
	uv run --group lint ruff format .

lint:
	uv run --group lint ruff format --check .
	uv run --group lint ruff check .

types:
	uv run --group types --group browser --extra plots --extra lessons --extra gguf --extra serve --group tasks basedpyright

test:
	uv run pytest

night:  ## the long forms of all suites, for hours
	.ci/run
	uv run --extra plots --extra serve --extra gguf --extra lessons --group serving --group interop --group browser \
	  pytest -m "slow and not parallel and not plan"
	XLA_FLAGS=--xla_force_host_platform_device_count=8 uv run pytest -m "slow and parallel"
	uv run --isolated --extra gpu-plan pytest -m "slow and plan"

site:  ## landing page with the model inside, report, museum and book: book/build/site/index.html
	uv run --group book python -m book.build
