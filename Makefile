# make train: environment, install, the main job.   make test: environment, install, lint, tests.
PYTHON ?= python3
VENV   ?= .venv
PROCS  ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: install train test test-all test-slurm test-gpu lint format docs parity anywhere clean

install: $(VENV)/.dev

# torch first and pinned: a resolver left free may choose a build for other hardware.
$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

# DeepSpeed names nothing that its setup.py needs, and imports the torch that is there; its kernels are built when used.
$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) setuptools
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) -e '.[dev]'
	touch $@

train: $(VENV)/.runtime
	$(BIN)/onecurve train -n $(PROCS) experiment=shakespeare

# Three workers for two cores: a fifth of the time tests wait for the runs that they have started.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadscope

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

# A real Slurm of its own, on this machine: minutes. Part of test-all.
test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest tests/slurm -m "slow or not slow"

# What only a GPU can show, on one of them; skipped where there is none.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu -n 4

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	env -u ONECURVE_CACHE $(BIN)/python -m trainer.config.reference > docs/REFERENCE.md
	$(BIN)/python -m trainer.config.strategy_page docs/STRATEGIES.md
	$(BIN)/python -m launch.recipes README.md

# The parity matrix, written into README and docs/STRATEGIES.md: minutes.
parity: $(VENV)/.dev
	$(BIN)/python -m tests.parity.matrix

# The any-to-any matrix of checkpoints, written into docs/CHECKPOINTS.md: a quarter of an hour.
anywhere: $(VENV)/.dev
	$(BIN)/python -m tests.anywhere.matrix

clean:
	rm -rf $(VENV) build dist *.egg-info
