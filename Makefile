# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
PIP = -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-fast lint wheel clean

demo: .venv/ready
	.venv/bin/langchain-rerank demo $(ARGS)

test: .venv-test/ready
	.venv-test/bin/python -m pytest $(ARGS)

test-fast: .venv-test/ready
	.venv-test/bin/python -m pytest -m "not slow and not gpu" $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check
	.venv-test/bin/ruff format --check
	.venv-test/bin/mypy

wheel: .venv-test/ready
	.venv-test/bin/python -m build --outdir dist

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) '.[qdrant,eval]'
	touch $@

# torch first and pinned: left to itself, pip on Linux takes a build with gigabytes of CUDA libraries.
.venv-test/ready: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP) -c tests/constraints.txt torch
	.venv-test/bin/python $(PIP) -c tests/constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-test build dist
