# Everything a contributor runs. Each target makes its own set-up in .venv from nothing but python3 (3.10 or newer, with
# venv), git and make; the second call finds it there.

DB ?=
ENGINE ?= auto
COVER ?=
ARGS ?=
MINUTES ?= 1
SEED ?=
FROM ?= docs/reference/benchmarks.json
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
UV := $(BIN)/uv
# Interpreters come from this machine. The venv below is uv's project too.
export UV_PYTHON_DOWNLOADS := never
export UV_PROJECT_ENVIRONMENT := $(VENV)
unexport VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help demo demo-admin test failover galera lint format types docs matrix django-tasks coverage bench bench-all charts kill-matrix task-kills outages soak clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.test ## watch a worker drain a queue of real files (DB=sqlite or DB=postgres)
	$(PY) examples/demo.py --db $(or $(DB),sqlite)

demo-admin: $(VENV)/.test ## look at what the demo left, in Django's admin
	$(PY) examples/demo.py admin $(if $(DB),--db $(DB))

test: $(VENV)/.test $(if $(filter-out all mariadb,$(DB)),,$(VENV)/.mariadb) ## run the tests on each kind of database that this machine has (DB=sqlite|postgres|postgres15|mariadb, ENGINE=portable, COVER=1, ARGS="-k word")
	$(PY) -m tests.suite --db $(or $(DB),all) --engine $(ENGINE) $(if $(COVER),--cover) $(ARGS)

failover: $(VENV)/.test ## kill a PostgreSQL under load, and promote its standby
	$(PY) -m tests.suite --db postgres tests/worker/test_failover.py -s -q --numprocesses=0

galera: $(VENV)/.mariadb ## let workers on three nodes of a Galera cluster run 3,000 tasks, and kill a node
	MODELQUEUE_TEST_TASKS=3000 $(PY) -m tests.suite --db mariadb tests/worker/test_galera.py -s -q --numprocesses=0

# One after the other, as the times of each are printed, and nothing is to disturb them.
kill-matrix: $(VENV)/.test $(if $(filter-out all mariadb,$(DB)),,$(VENV)/.mariadb) ## kill each part of a worker at each moment, and show how fast it goes on (DB=postgres|sqlite|mariadb)
	$(PY) -m tests.suite $(if $(DB),--db $(DB),--db postgres --db sqlite --db mariadb) -q -s --numprocesses=0 -p no:randomly tests/faults/test_kill_matrix.py $(ARGS)

task-kills: $(VENV)/.test ## run 10,000 atomic Django tasks on three workers that are killed at random, and 1,000 in their order on four
	MODELQUEUE_TEST_TASKS=10000 $(PY) -m tests.suite --db postgres -q -s --numprocesses=0 tests/task_backend/test_kills.py $(ARGS)
	MODELQUEUE_TEST_TASKS=1000 $(PY) -m tests.suite --db postgres -q -s --numprocesses=0 tests/task_backend/test_order.py $(ARGS)

outages: $(VENV)/.test $(if $(filter-out all mariadb,$(DB)),,$(VENV)/.mariadb) ## take the database away from workers under load, in each way, for a minute (DB=postgres|mariadb|sqlite, ARGS='-k "disk is full"')
	MODELQUEUE_TEST_OUTAGE=$${MODELQUEUE_TEST_OUTAGE:-60} MODELQUEUE_TEST_ENDING=$${MODELQUEUE_TEST_ENDING:-20} \
	$(PY) -m tests.suite $(if $(DB),--db $(DB),--db postgres --db mariadb --db sqlite) -q -s --numprocesses=0 -p no:randomly tests/soak/test_soak.py::test_outage $(ARGS)

soak: $(VENV)/.test ## do everything to workers under load (MINUTES=20, SEED=7 to repeat one, ARGS="--server mariadb")
	$(PY) -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: $(VENV)/.lint ## check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.lint ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.types ## check the types
	$(BIN)/mypy

# The shims of pyenv refuse a version that is not activated, so look behind them.
ALL_PYTHONS = pyenv=$$(pyenv root 2>/dev/null || true); PATH="$$(printf '%s:' "$$pyenv"/versions/3.*/bin)$$PATH"

matrix: $(VENV)/.matrix ## run the tests on SQLite and PostgreSQL with each supported pair of Python and Django
	@$(ALL_PYTHONS); \
	$(BIN)/tox run -- $(ARGS) || { \
		for cell in $$($(BIN)/tox list -q --no-desc); do \
			[ -x build/tox/$$cell/bin/python ] || echo "  $$cell: not run, its Python is not on PATH"; \
		done; exit 1; }

# In the environments of the matrix; the archives of Django are fetched once, into build/django.
django-tasks: $(VENV)/.matrix ## run Django's own tests of its task API with our backend in place of Django's (ARGS="--db postgres")
	@$(ALL_PYTHONS); failed=0; \
	for cell in py312-django60 py313-django61; do \
		$(BIN)/tox exec -q -e $$cell -- python -m tests.task_backend.django_suite $(ARGS) || failed=1; \
	done; exit $$failed

# Data from before the last change of the code counts for nothing: its lines are other lines.
coverage: $(VENV)/.test ## sum up what make test COVER=1 and make matrix have covered; less than every line and branch fails
	@mkdir -p build/coverage
	@find build/coverage -type f ! -newer "$$(find src -name '*.py' -exec ls -t {} + | head -1)" -print -delete \
	| awk 'END { if (NR) print "Left out: " NR " data files older than the code." }'
	$(BIN)/coverage combine --quiet --keep --data-file=build/data build/coverage
	$(BIN)/coverage report --data-file=build/data

docs: $(VENV)/.docs ## build the documentation into build/docs; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -n -q -b html -d build/doctrees docs build/docs

bench: $(VENV)/.test $(VENV)/.mariadb ## measure the worker beside other queues, in less than ten minutes (ARGS="drain --db sqlite")
	$(PY) -m benchmarks $(ARGS)

bench-all: $(VENV)/.test $(VENV)/.mariadb ## the same with more tasks and more rounds, for hours
	$(PY) -m benchmarks --long $(ARGS)

charts: $(VENV)/.test $(VENV)/.charts ## draw the charts of a stored result of the benchmarks (FROM=file.json)
	$(PY) -m benchmarks --from $(FROM) --charts docs/reference/charts

clean: ## remove what the targets have made
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache

# Set-up. A stamp per group of dependencies, so that `make lint` does not install a database.

$(UV):
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'ModelQueue needs Python 3.10 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.test $(VENV)/.lint $(VENV)/.types $(VENV)/.docs $(VENV)/.matrix $(VENV)/.charts: $(VENV)/.%: pyproject.toml uv.lock | $(UV)
	$(UV) sync --quiet --frozen --inexact --no-default-groups --group $*
	@touch $@

# The driver has to be compiled. Where that can not be done `make test` says so beside the database's name and goes on;
# there is no stamp then, so that the next call tries again.
$(VENV)/.mariadb: $(VENV)/.test
	@if ! PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v mariadbd >/dev/null; then :; \
	elif $(UV) sync --quiet --frozen --inexact --no-default-groups --group test --group mariadb 2>$(VENV)/mariadb.log; \
	then touch $@; else echo "MariaDB's driver could not be compiled, see $(VENV)/mariadb.log"; fi
