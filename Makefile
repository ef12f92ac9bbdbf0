# Everything that a checkout needs. `make demo` and `make test` set up .venv by themselves; `make help` lists the rest.

SHELL  := /bin/bash
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
PYTHON ?= $(shell command -v python3.11 || echo python3)

# The extras of the last set-up stay in force, so that `make test` on a GPU machine does not bring the CPU build back.
INSTALLED := $(shell cat $(VENV)/.extras 2>/dev/null)
DEFAULTS  := cpu,dev
EXTRAS    ?= $(or $(INSTALLED),$(DEFAULTS))
TORCH_CPU       := torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
UV := uv==0.13.9

# The lock: one version for each package, the same here and in the image (k8s/Dockerfile).
LOCK   := requirements/common.txt requirements/$(if $(findstring gpu,$(EXTRAS)),gpu,cpu).txt
TARGET ?= cpu
IMAGE  ?= rlhf-dist:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' rlhf_dist/__init__.py)-$(TARGET)

# Tests that read public data sets are skipped where the folder is missing; tests/conftest.py says what is in it.
ifneq ($(wildcard ../shared/data),)
export RLHF_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint style typecheck bench lock image clean FORCE

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## Make .venv (GPU machine: make EXTRAS=gpu,dev setup)

demo: $(STAMP) ## The embedded example: SFT, reward model and PPO on two cores (ARGS="train.steps=20" overrides)
	@$(PY) -m rlhf_dist.main $(ARGS)

test: $(STAMP) ## Unit and integration tests, about 25 minutes (ARGS goes to pytest)
	@$(PY) -m pytest -m "not slow and not gpu" $(wildcard tests/unit tests/integration) $(ARGS)

test-all: $(STAMP) ## The slow ones too; all that need no GPU
	@$(PY) -m pytest -m "not gpu" $(wildcard tests/unit tests/integration) $(ARGS)

lint: $(STAMP) ## Check style and common mistakes
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/hadolint k8s/Dockerfile
	@$(VENV)/bin/shellcheck cluster/*.sh

style: $(STAMP) ## Format, and fix what can be fixed
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

typecheck: $(STAMP) ## mypy
	@$(VENV)/bin/mypy

bench: $(STAMP) ## Benchmarks in small: that they run; ARGS="rollout exchange" chooses
	@for name in $(or $(ARGS),rollout learner exchange efficiency scaling startup); do \
	    echo "== $$name"; $(PY) -m benchmarks.$$name --small || exit 1; done

lock: $(STAMP) ## Bring requirements/ up to date with pyproject.toml
	@$(PIP) install -qq "$(UV)"
	@PATH="$(VENV)/bin:$$PATH" $(PY) requirements/lock.py $(or $(addprefix --find-links ,$(PIP_FIND_LINKS)),\
	    --extra-index-url "$(TORCH_CPU_INDEX)" --index-strategy unsafe-best-match)

image: ## Build the image of k8s/ (TARGET=cpu or gpu, IMAGE=registry/name:tag)
	docker build -f k8s/Dockerfile --build-arg TARGET="$(TARGET)" --build-arg TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" \
	    --build-arg VERSION="$(lastword $(subst :, ,$(IMAGE)))" --build-arg REVISION="$$(git rev-parse HEAD)" -t "$(IMAGE)" .

clean: ## Remove caches and build outputs; runs/ and .venv stay
	@rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

ifneq ($(EXTRAS),$(INSTALLED))
$(STAMP): FORCE
endif

# -qq hides pip's warnings and keeps its errors. The stamp is written last: a failed set-up starts again.
$(STAMP): pyproject.toml $(LOCK)
	@rm -f $(STAMP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	    echo "error: Python 3.11 is needed, '$(PYTHON)' is missing or another version; try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@command -v c++ g++ clang++ >/dev/null || { \
	    echo "error: a C++ compiler (g++ or clang++) is needed; vLLM compiles kernels with it" >&2; exit 1; }
	@test -x $(PY) || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "$(EXTRAS)" > $(VENV)/.extras
	@case ",$(EXTRAS)," in *,cpu,*) \
	    echo "installing $(TORCH_CPU)"; \
	    $(PIP) install -qq "$(TORCH_CPU)" 2>/dev/null || { \
	        echo "  not among the packages pip is set up for; taking it from $(TORCH_CPU_INDEX)"; \
	        $(PIP) install -qq "$(TORCH_CPU)" --extra-index-url "$(TORCH_CPU_INDEX)"; } ;; esac
	@echo "installing rlhf_dist[$(EXTRAS)] (some minutes the first time)"
	@sed -n 's/^\([a-z0-9].*==[^ ]*\).*/\1/p' $(LOCK) > $(VENV)/constraints.txt # pip takes no digests beside -e
	@$(PIP) install -qq -c $(VENV)/constraints.txt -e ".[$(EXTRAS)]"
	@for package in torchvision torchaudio torchcodec; do \
	    if $(PIP) show -qq $$package 2>/dev/null && ! $(PY) -c "import $$package" 2>/dev/null; then \
	        echo "removing $$package: it does not fit this build of torch, and nothing here needs it"; \
	        $(PIP) uninstall -qq -y $$package; \
	    fi; \
	done
	@touch $(STAMP)
	@echo "$(VENV) is ready"
