# install   create .venv with the pinned packages (BUILD=cpu|cuda, by default what nvidia-smi says; PYTHON=python3.12)
# test      ruff, mypy and pytest, as .ci/run does
# demo      simulate, preprocess, train, evaluate and score in .demo
# bench     the speed benchmarks; each prints JSON
# prove     the long proofs: the steps of the image run without Docker, nodes of a Slurm cluster lost (as root, after tests/slurm/cluster.sh install), preprocess and score killed 30 times, 200 random plans beside TorchRec's, a training hit by 30 faults, and the full study, just under two hours on 2 idle cores (goes on where it was cut off); writes docs/study.md
# wheel     build dist/*.whl
# clean     remove what these made, but not .venv

BUILD ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALLED := $(VENV)/.installed-$(BUILD)
INSTALLED_DEV := $(VENV)/.installed-dev
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: install test demo bench prove wheel clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): requirements/common.txt requirements/$(BUILD).txt pyproject.toml
	@set -e; python=; \
	for stamp in $(VENV)/.installed-cpu $(VENV)/.installed-cuda; do \
	  if [ "$$stamp" != "$@" ] && [ -e "$$stamp" ]; then echo "removing $(VENV): it holds the other build"; rm -rf $(VENV); fi; \
	done; \
	if ! $(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then \
	  for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
	    if "$$candidate" -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 or newer among: $(or $(PYTHON),python3.11 python3 python3.12 python3.13)" >&2; \
	    echo "hint: install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 2; \
	  fi; \
	  echo "creating $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV); \
	fi; \
	echo "installing requirements/$(BUILD).txt"; \
	$(PIP) install --no-deps -r requirements/$(BUILD).txt; \
	$(PIP) install --no-deps --no-build-isolation -e .; \
	$(BIN)/python -m escm2rec doctor; \
	touch $@

$(INSTALLED_DEV): requirements/dev.txt $(INSTALLED)
	@echo "installing requirements/dev.txt"
	@$(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

test: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

demo: install
	$(BIN)/python apps/demo.py --out .demo

bench: install
	$(BIN)/python -m benchmarks.preprocess
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.layout
	$(BIN)/python -m benchmarks.reader
	$(BIN)/python -m benchmarks.metrics
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.first_step
	$(BIN)/python -m benchmarks.score --alone

prove: $(INSTALLED_DEV)
	ESCM2REC_IMAGE_PROOF=1 $(BIN)/python -m pytest tests/test_dockerfile.py
	ESCM2REC_SLURM_PROOF=docs/results/slurm.json $(BIN)/python -m pytest tests/test_slurm.py
	ESCM2REC_KILLS=30 ESCM2REC_KILLS_PROOF=docs/results/kills.json $(BIN)/python -m pytest tests/test_preprocess_engine.py
	ESCM2REC_SCORE_KILLS=30 ESCM2REC_SCORE_KILLS_PROOF=docs/results/score_kills.json $(BIN)/python -m pytest tests/test_scoring.py -k killed
	ESCM2REC_PLANS=200 ESCM2REC_PLANS_PROOF=docs/results/planner_random.json $(BIN)/python -m pytest tests/test_planning_search.py -k random
	ESCM2REC_SOAK=30 ESCM2REC_SOAK_PROOF=docs/results/soak.json $(BIN)/python -m pytest tests/test_soak.py
	$(BIN)/escm2rec study --preset full --out .study > docs/results/study.json.partial
	$(BIN)/python -m escm2rec.study.document .study > docs/study.md.partial
	mv docs/results/study.json.partial docs/results/study.json
	mv docs/study.md.partial docs/study.md

wheel: install
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .demo .study build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
