# Two commands matter: `make serve` and `make test`. `make` alone lists them all.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)
# vllm or emulated
ENGINE ?= vllm
# Set, a GPU is there: install vLLM's CUDA build instead of its CPU build.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
BUILD := $(if $(GPU),gpu,cpu)

VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# Where a folder of wheels is given, the CPU build of torch is there; else PyTorch's index has it.
TORCH_FROM := $(if $(PIP_FIND_LINKS),$(FIND_LINKS),--index-url $(TORCH_CPU_INDEX))
OVERRIDES := --overrides requirements/overrides.txt
# Most of these tests wait for processes.
PARALLEL := --numprocesses 3 --dist loadgroup
# Built as C extensions in place (setup.py): a change of one has to be built again.
COMPILED := router/core/demand.py router/core/policies/cost.py router/core/residency.py \
	router/core/shares.py router/core/timing.py router/frontend/connection.py \
	router/frontend/exchange.py router/frontend/relay.py router/frontend/request.py \
	router/frontend/service.py router/patience.py router/telemetry/answer.py router/workers/upstream.py \
	sim/engine.py sim/host.py sim/kv.py
CACHE := .lorayard
MODEL := $(CACHE)/smollm2-135m

.PHONY: help serve install install-engine install-train test test-fast test-lowest lint format \
	bench bench-data-plane validate demo-adapters clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

serve: $(VENV)/.core  ## set up and serve the demonstration on http://127.0.0.1:8000/v1 (ENGINE=emulated: no vLLM)
	@engine=$(ENGINE); \
	if [ "$$engine" = vllm ]; then \
		echo "==> engine: vLLM, $(BUILD) build$(if $(GPU), for $(GPU))"; \
		$(MAKE) --no-print-directory install-engine \
		|| { [ $(BUILD) = gpu ] && echo "==> the GPU build cannot be installed: trying the CPU build" \
			&& $(MAKE) --no-print-directory install-engine BUILD=cpu; } \
		|| { echo "==> vLLM cannot be installed on this machine (see above): starting the emulated engine"; \
			engine=emulated; }; \
	fi; \
	if [ "$$engine" = vllm ]; then \
		echo "==> demo model"; \
		$(PY) -m engine_worker.demo build $(MODEL); \
		echo "==> router and two vLLM workers (booting takes a minute or two on a CPU)"; \
		exec $(PY) -m router serve configs/quickstart.yaml; \
	else \
		echo "==> router and two emulated workers"; \
		exec $(PY) -m router serve configs/quickstart-emulated.yaml; \
	fi

install: $(VENV)/.test $(VENV)/.azurite  ## the virtual environment with the development tools, without an engine

install-engine: $(VENV)/.engine-$(BUILD)  ## vLLM (the CPU build where there is no GPU) and the demo model's package

install-train: $(VENV)/.engine-$(BUILD)  ## what training the demo adapters needs
	$(UV) pip install --python $(PY) -q $(FIND_LINKS) $(OVERRIDES) -e '.[train]'

$(VENV)/bin/uv:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none was found"; exit 1; }
	@echo "==> virtual environment in $(VENV) ($(PYTHON))"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q uv

$(VENV)/.core: $(VENV)/bin/uv pyproject.toml setup.py $(COMPILED)
	@echo "==> installing the router"
	@$(UV) pip install --python $(PY) -q -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "==> installing the development tools"
	@$(UV) pip install --python $(PY) -q -e '.[test]'
	@touch $@

# The emulator of Azure's object store. Where it cannot be had its tests are skipped, and say so; the
# next `make` tries again.
$(VENV)/.azurite: | $(VENV)/bin/uv
	@if ! command -v npm >/dev/null; then \
		echo "==> npm is not installed: the tests of az:// will be skipped"; \
	elif echo "==> installing Azurite" && npm install --silent --no-audit --no-fund --no-save \
		--prefix $(VENV)/azurite azurite@3.37; then touch $@; \
	else echo "==> npm cannot install Azurite: the tests of az:// will be skipped"; fi

$(VENV)/.engine-cpu: $(VENV)/.core requirements/overrides.txt
	@echo "==> installing torch and vLLM for the CPU (3 GB, minutes the first time)"
	@$(UV) pip install --python $(PY) --no-deps $(TORCH_FROM) $(TORCH)
	@$(UV) pip install --python $(PY) $(FIND_LINKS) $(OVERRIDES) -e '.[cpu,demo]' $(TORCH)
	@touch $@

$(VENV)/.engine-gpu: $(VENV)/.core requirements/overrides.txt
	@echo "==> installing vLLM for the GPU (8 GB, minutes the first time)"
	@$(UV) pip install --python $(PY) $(FIND_LINKS) --overrides requirements/overrides-gpu.txt -e '.[gpu,demo]'
	@touch $@

test: $(VENV)/.test install-engine lint test-lowest test-fast  ## everything: linters, types, all tests, real vLLM included
	$(PY) -m pytest -m vllm

test-fast: $(VENV)/.test $(VENV)/.azurite  ## all tests that need no vLLM: some minutes
	$(PY) -m pytest -m "not vllm" $(PARALLEL)

test-lowest: $(VENV)/bin/uv $(VENV)/.core $(VENV)/.azurite  ## the fast tests on the lowest versions that pyproject.toml allows
	@test -x $(VENV)-lowest/bin/python || $(UV) venv -q --python $(PYTHON) $(VENV)-lowest
	@$(UV) pip install -q --python $(VENV)-lowest/bin/python --resolution lowest-direct -e '.[test]'
	$(VENV)-lowest/bin/python -m pytest -q -m "not vllm" $(PARALLEL)

lint: $(VENV)/.test  ## ruff and mypy --strict
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/.test  ## format the code
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

bench: $(VENV)/.test  ## measure the router's cost and the simulator's speed on emulated engines
	$(PY) -m benchmarks.recorder_overhead
	$(PY) -m benchmarks.simulator_speed
	$(PY) -m benchmarks.decisions
	$(PY) -m benchmarks.overload
	$(PY) -m benchmarks.downloads

bench-data-plane: $(VENV)/.test  ## measure this router beside vllm-router, smg and HAProxy (half an hour)
	$(PY) -m benchmarks.data_plane --profile

validate: $(VENV)/.test install-engine  ## compare the simulator with two real vLLM workers of this machine (half an hour)
	$(PY) -m engine_worker.demo build $(MODEL)
	$(PY) -m benchmarks.validation --calibrate $(CACHE)/mine.json

demo-adapters: install-train  ## train the demonstration's adapters again (12 minutes on 2 cores)
	$(PY) -m engine_worker.demo build $(MODEL)
	$(PY) -m engine_worker.demo train $(MODEL) configs/demo-adapters

clean:  ## remove what was built: environments, demo model, caches
	find router sim -name '*.so' -delete; rm -rf build lorayard__mypyc*.so $(VENV) $(VENV)-lowest $(CACHE) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
