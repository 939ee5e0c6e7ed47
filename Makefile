# `make` prints what there is. PYTHON is the interpreter the environment is made with; everything else runs in $(VENV).
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
RUNS ?= runs/demo

STAMP := $(VENV)/.installed
# $(VENV)/bin on PATH: `ray job submit` and DeepSpeed's builder look for `python` and `ninja` there.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_AUTH_MODE ?= token
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-kills check format bench bench-gpu serve constraints clean

help: ## this page
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: PYTHON=python3.12          which interpreter makes $(VENV) (3.11 or newer)"
	@echo "             ARGS='--seed 1'            more flags for demo, test, test-slow and serve"
	@echo "             RUNS='runs/a runs/b'       run directories to serve"
	@echo "             TORCH_INDEX=URL            package index to take torch from. On a machine without an NVIDIA GPU,"
	@echo "                                        https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries"

install: $(STAMP) ## make .venv with the versions of constraints.txt (redone only when they or pyproject.toml change)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: name a Python >= 3.11, e.g. make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "soul needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) -V 2>&1): try make install PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): about 2.5 GB without CUDA, a few minutes"
	$(PYTHON) -m venv $(VENV)
	@# torch first and alone, so that TORCH_INDEX is asked for nothing else
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,peft]'
	@touch $@

demo: install ## invented authors, a tiny model, SO-NPO beside its first-order twin, a report: runs/demo/report.html
	$(RUN) pipelines/tofu.py --output runs/demo $(ARGS)

test: install ## every test that takes seconds (no GPU, no network)
	$(RUN) -m pytest -n 2 --dist loadscope $(ARGS)

test-slow: install ## the tests that take minutes
	$(RUN) -m pytest -m "slow and not gpu" $(ARGS)

test-kills: install ## worker, driver and node killed at 20 random moments, and the table of how the runs ended
	$(RUN) -m tests.orchestration.kills $(ARGS)

check: install ## format, lint, types (strict), and the rules about the project itself
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q tests/project

format: install ## rewrite the files as `check` wants them
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: install ## speed and memory comparisons, one script of perf/ after the other
	@for script in perf/[!_]*.py; do echo "== $$script"; $(RUN) $$script || exit 1; done

bench-gpu: install ## speed and memory on one GPU without Ray, the scripts of perf/gpu (docs/speed.md)
	@for script in perf/gpu/[!_]*.py; do echo "== $$script"; $(RUN) $$script $(ARGS) || exit 1; done

serve: install ## OpenAI-style HTTP server for the models of RUNS
	$(RUN) pipelines/serve.py $(RUNS) $(ARGS)

constraints: ## rewrite constraints.txt from what .venv holds (upgrade there, `make test`, then this)
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	   $(VENV)/bin/python -m pip freeze --all --exclude-editable | sed -E '/^(pip|soul-unlearning)[= ]/d; s/^(torch==[^+]*)\+.*/\1/'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
