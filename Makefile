# make report                the demo study and the page              make lab     the notebooks in JupyterLab
# make report STUDY=<name>   one study (a file in params/); STUDY=all: all demo studies
# make report STUDY=own_data DATA=cells.h5ad LABEL=celltype           your own cells
# make plan STUDY=<name>     arms, jobs, downloads, disk and time of a study, before anything starts
# make publish STUDY=<name>  copy its results, figures and README numbers into the repository
# make test                  all tests, notebooks included            make check   format, lint, hygiene
# make bench                 what the stages cost on this machine     make params  params/_base.yaml, from keys.py
STUDY ?= default
PYTHON ?= python3.11 python3 python
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

BIN := .venv/bin
ENV := .venv/complete
export OMP_NUM_THREADS = 1
export STUDY DATA LABEL  # read by the commands and by own_data.yaml, never by a shell line

.PHONY: report plan publish params test check lint lab bench
.DELETE_ON_ERROR:

report: $(ENV)
	@$(BIN)/python -m tuneformer.study "$$STUDY"
	@$(BIN)/python -m tuneformer.data.download "$$STUDY"
	@$(BIN)/snakemake --cores $(JOBS) --config study="$$STUDY"
	@echo "$(CURDIR)/site/index.html"

plan: $(ENV)
	@$(BIN)/python -m tuneformer.report.plan "$$STUDY"

publish: $(ENV)
	@$(BIN)/python -m tuneformer.report.results publish "$$STUDY"

params: $(ENV)
	@$(BIN)/python -m tuneformer.params

test: lint
	@$(BIN)/pytest tests notebooks -n $(JOBS) --dist loadfile \
		--nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout 300

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
	@python=$$(for name in $(PYTHON); do \
		$$name -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $$name && break; done); \
	if [ -z "$$python" ]; then \
		echo "tuneformer needs Python 3.11, and none of these is one: $(PYTHON). Name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	echo "Making .venv from requirements.txt with $$python (once, some minutes) ..."; \
	rm -rf .venv && $$python -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
