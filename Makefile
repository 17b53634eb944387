# `make demo` and `make test` are all that a fresh machine needs: the first call sets everything up.
PYTHON ?= python3
VENV ?= .venv
# The PyTorch release that was tested last. If it is not available, pip takes what pyproject.toml allows.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINIMUM := .venv-minimum
# One worker per core. Each computes with one thread, so that the workers do not compete for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# Fuzz tests: how many cases, and which ones.
CASES ?= 1000
SEED ?= 0

.PHONY: demo test test-slow test-fuzz test-minimum test-comfyui lint clean

demo: $(INSTALLED)
	$(BIN)/qartsr demo -o demo_output

# The fast tests: at most six minutes on two cores.
test: $(INSTALLED)
	$(PYTEST)

# The long tests: at most 25 minutes. One after another, because some start several processes of their own.
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Mutated checkpoint folders, calls and image files: 1,000 cases in at most ten minutes on two cores.
test-fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz/run.py --cases $(CASES) --seed $(SEED)

# The fast tests on exactly the lowest versions that pyproject.toml declares, in an environment of their own.
test-minimum: $(MINIMUM)/.installed
	$(MINIMUM)/bin/python -m pytest

# A real ComfyUI: COMFYUI_PATH is its checkout, COMFYUI_PYTHON an interpreter that has its requirements and ours.
test-comfyui: $(INSTALLED)
	@test -n "$(COMFYUI_PATH)" || { echo "set COMFYUI_PATH to a ComfyUI checkout, see docs/comfyui.md" >&2; exit 2; }
	$(BIN)/python -m pytest -m comfyui tests/comfyui

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) $(MINIMUM) build *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch and the packages that QArtSR needs (several minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet '$(TORCH)' >/dev/null 2>&1 || true
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@# Of these two, only files with weights are read; without their dependencies, they bring no torchvision.
	@$(BIN)/python -m pip install --quiet --no-deps lpips dists-pytorch >/dev/null 2>&1 || true
	@# Triton's interpreter tests the GPU kernels on any processor. Where there is no wheel, those tests are skipped.
	@$(BIN)/python -m pip install --quiet triton >/dev/null 2>&1 || true
	@touch $@

$(MINIMUM)/.installed: pyproject.toml tools/minimum_requirements.py
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python tools/minimum_requirements.py test > $(MINIMUM)/requirements.txt
	$(MINIMUM)/bin/python -m pip install --quiet -r $(MINIMUM)/requirements.txt
	$(MINIMUM)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@
