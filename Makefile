# make report                blood cells, demo, and the page            make lab     the notebooks in JupyterLab
# make report STUDY=<name>   one study (a file in params/); STUDY=all: all demo studies
# make report PROFILE=slurm  the same on a cluster (profiles/slurm)   make report JOBS=2: so many jobs at a time
# make report STUDY=own_data DATA=cells.h5ad LABEL=celltype           your own cells
# make plan STUDY=<name>     arms, jobs, downloads, disk and time of a study, before anything starts
# make publish STUDY=<name>  copy its results, figures and README numbers into the repository
# make test                  all tests, notebooks included            make check   format, lint, hygiene
# make bench                 what the stages cost on this machine     make params  params/_base.yaml, from keys.py
STUDY ?= default
PYTHON ?= python3.11 python3 python
JOBS ?=

BIN := .venv/bin
ENV := .venv/complete
export OMP_NUM_THREADS = 1
# What a user writes is read by Python, and by the shell only as the value of a variable: it is never part of a command.
$(foreach name,STUDY DATA LABEL PROFILE JOBS PYTHON,$(eval override export $(name) := $$(value $(name))))

.PHONY: report plan publish params test test-slurm check lint lab bench
.DELETE_ON_ERROR:

report: $(ENV)
	@$(BIN)/python -m tuneformer.batch
	@echo "$(CURDIR)/site/index.html"

plan: $(ENV)
	@$(BIN)/python -m tuneformer.report.plan "$$STUDY"

publish: $(ENV)
	@$(BIN)/python -m tuneformer.report.results publish "$$STUDY"

params: $(ENV)
	@$(BIN)/python -m tuneformer.params

test: lint
	@$(BIN)/pytest tests notebooks -n "$${JOBS:-logical}" --dist loadfile \
		--nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout 300

test-slurm: $(ENV)  # starts a cluster of one node on this machine, as root of a Debian or Ubuntu, and ends it
	@command -v slurmdbd >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends \
		slurm-wlm munge slurmdbd mariadb-server; }
	@TUNEFORMER_TEST_SLURM=1 $(BIN)/pytest tests/slurm

check: lint
	@$(BIN)/pytest -q tests/notebooks

lint: $(ENV)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

lab: $(ENV)
	@cd notebooks && env -u OMP_NUM_THREADS ../$(BIN)/jupyter lab

bench: $(ENV)
	@$(BIN)/python benchmarks/bench.py

# Written last: a .venv without it was left half-made, and is made again from nothing.
$(ENV): requirements.txt pyproject.toml
	@python=$$(for name in $$PYTHON; do \
		$$name -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $$name && break; done); \
	if [ -z "$$python" ]; then \
		echo "tuneformer needs Python 3.11, and none of these is one: $$PYTHON. Name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	echo "Making .venv from requirements.txt with $$python (once, some minutes) ..."; \
	rm -rf .venv && $$python -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
