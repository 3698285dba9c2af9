# The same targets serve people and CI. VENV may name an environment elsewhere. Folders may have any
# name: paths stand in quotes, and PATH is all that needs an absolute one.
VENV ?= .venv
PYTHON ?= python3
BLANK := $(subst x,,x x)
MADE := $(subst $(BLANK),\ ,$(VENV))/installed
# Stages run `python -m …`: the environment's interpreter must be the first one found.
export PATH := $(if $(filter /%,$(firstword $(VENV))),,$(CURDIR)/)$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export PYTHONUNBUFFERED := 1
export PYTHONSAFEPATH :=
# In a container whose user has no name: DVC asks for one.
ifeq ($(shell id -un 2>/dev/null),)
export LOGNAME ?= nobody
endif
BIN := "$(VENV)"/bin

.PHONY: help env repro compare flow ui app retrain serve test check examples bench pull push gc

help:           ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(MADE): pyproject.toml constraints.txt
	@mkdir "$(VENV).making" 2>/dev/null || { echo "another make is at work on $(VENV); wait for it, or remove $(VENV).making if it was killed" >&2; exit 1; }
	@trap 'rmdir "$(VENV).making"' EXIT; set -ex; \
	$(PYTHON) -m venv "$(VENV)"; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	$(BIN)/python -m dlplora.cli check-runtime; \
	touch "$@"

env: $(MADE)    ## Make the environment with pinned dependencies

repro: env      ## Bring the pipeline up to date
	@$(BIN)/python -m dlplora.cli repro

compare: env    ## Compare all systems, in a worktree: your own tree stays as it is
	@$(BIN)/python -m dlplora.cli repro-suite compare

flow: env       ## Bring the pipeline up to date by Prefect, without a server
	@$(BIN)/python -m flows.pipeline

ui: env         ## Open Prefect's pages on 127.0.0.1: watch runs and start them; Ctrl-C ends all
	@$(BIN)/python -m flows.ui

app: env        ## Open the app in the browser: data, training, asking, models; Ctrl-C ends all
	@$(BIN)/python -m flows.app

retrain: env    ## Take new data in, train what changed, judge it, and promote it unless it is worse
	@$(BIN)/python -m flows.retrain

serve: env      ## Serve the model in production by OpenAI's API on 127.0.0.1:8000; Ctrl-C ends it
	@$(BIN)/python -m dlplora.cli serve

test: env       ## Run the tests
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: env      ## Run the linters, types and import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/codespell
	@$(BIN)/hadolint Dockerfile

examples: env   ## Ask the examples of the README, and compare their answers
	@$(BIN)/python -m benchmarks.examples

# Tasks of the suite default.
BENCH_TASKS := intent_recognition restaurant_description valid_parentheses

$(MADE)-bench: $(MADE)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	touch "$@"

bench: $(MADE)-bench  ## Time engine, training and scoring beside PEFT, Trainer, TRL, lm-eval
	@$(BIN)/python -m dlplora.cli repro base_model $(addprefix ingest@,$(BENCH_TASKS))
	@$(BIN)/python -m benchmarks.fused
	@$(BIN)/python -m benchmarks.adapters
	@$(BIN)/python -m benchmarks.training
	@$(BIN)/python -m benchmarks.scoring
	@$(BIN)/python -m benchmarks.roofline
	@$(BIN)/python -m benchmarks.retrieval

pull: env       ## Fetch results, the run-cache and models from the remotes
	@$(BIN)/python -m dlplora.cli pull

push: env       ## Send results, the run-cache and models to the remotes
	@$(BIN)/python -m dlplora.cli push

gc: env         ## Free the cache of what no model, branch or worktree needs
	@$(BIN)/python -m dlplora.cli gc
