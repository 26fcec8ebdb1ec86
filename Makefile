# `make lab` and `make test` are the two main commands; `make` alone lists all of them.
PYTHON ?= python3
BIN := .venv/bin
# nbgrader has its own environment without PyTorch, because it only starts the kernels, which run in .venv.
LABS := .venv-classroom/bin/python notebooks/labs/grading/course.py
export OMP_WAIT_POLICY ?= passive
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# nbval runs every code cell and compares the output of cells tagged nbval-check-output with the stored one. On two cores,
# two notebooks at a time with one core each are faster than one after the other.
NBVAL := -p tests.budgets --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval.cfg -n 2 --dist loadscope -q

.DEFAULT_GOAL := help
.PHONY: help setup lab lock test quick notebooks execute full html wheel lint publish-config format clean classroom release grade grades feedback questions classroom-test

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## Install everything for notebooks, site and tests into .venv

.venv/.ready: pyproject.toml
	@$(PYTHON) install.py notebooks test site bench
	@touch .venv/.notebooks .venv/.site $@

# .venv/.notebooks and .venv/.site install only the extra of that name.
.venv/.%: pyproject.toml
	@$(PYTHON) install.py $*
	@touch $@

# JupyterLab refuses to run as root, the only user of many containers, without --allow-root.
lab: .venv/.notebooks ## Open JupyterLab on the first notebook
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_why_structure.ipynb

lock: setup ## Write the versions installed in .venv to constraints.txt
	@{ echo "# Versions that the notebooks were last tested with, for LOCKED=1 make lab; written by make lock."; \
	$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check; } > constraints.txt

test: setup lint ## Run all tests but those of the labs: library, command line, browser, notebooks
	$(PYTEST) -n 2 --dist worksteal -m "not timed and not classroom"
	$(PYTEST) -m timed
	$(MAKE) notebooks

quick: setup lint ## Run the fast tests, in about two minutes
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not browser and not classroom" -x -q

notebooks: setup ## Run the notebooks in the quick profile and compare their times with their budgets
	PWLIB_PROFILE=quick $(PYTEST) $(NBVAL) --nbval-cell-timeout=600 notebooks/[0-9]*.ipynb

execute: setup ## Run notebooks and store their outputs, normalised: make execute NOTEBOOKS=notebooks/00*.ipynb
	CUDA_VISIBLE_DEVICES= $(BIN)/python docs/execute.py $(or $(NOTEBOOKS),notebooks/[0-9]*.ipynb)

full: setup ## Run the notebooks in the full profile (hours on a CPU)
	PWLIB_PROFILE=full $(BIN)/python -m pytest $(NBVAL) --nbval-cell-timeout=14400 notebooks/[0-9]*.ipynb

classroom: .venv-classroom/.ready ## Install nbgrader for the labs into .venv-classroom

.venv-classroom/.ready: pyproject.toml .venv/.ready
	test -x .venv-classroom/bin/python || $(PYTHON) -m venv .venv-classroom
	.venv-classroom/bin/python -m pip install --quiet $(shell sed -n 's/^classroom = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
	@touch $@

release: classroom ## Write the labs without solutions to notebooks/labs/release (LAB=lab2, DUE='2030-11-28 18:00 Europe/Berlin')
	$(LABS) release $(LAB) $(if $(DUE),--due "$(DUE)")

grade: classroom ## Grade submissions: make grade SUBMITTED=folder (LAB=lab2, STUDENT=ada, AGAIN=1, UNSAFE=1)
	$(LABS) grade "$(SUBMITTED)" $(addprefix --lab=,$(LAB)) $(addprefix --student=,$(STUDENT)) $(if $(AGAIN),--again) $(if $(UNSAFE),--unsafe)

feedback: classroom ## Write the students' feedback pages to notebooks/labs/feedback
	$(LABS) feedback $(LAB)

grades: classroom ## Write the grades to notebooks/labs: grades.csv, and tables for Moodle and Canvas
	$(LABS) export

questions: .venv/.notebooks ## Write the notebooks' quick questions for Moodle: notebooks/labs/questions.gift
	$(BIN)/python notebooks/labs/grading/questions.py notebooks/labs/questions.gift

classroom-test: classroom ## Test the labs: release, grade and return them with made-up students
	$(PYTEST) tests/classroom -n 2 --dist loadgroup -q

html: .venv/.site ## Build a static site from the executed notebooks: build/html
	$(BIN)/python docs/build.py build/html

lint: setup ## Check style (ruff), configuration, texts and stored notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/lint.py
	$(BIN)/python docs/publish.py --check

publish-config: ## Write the project's address into badges and links: make publish-config REPOSITORY=owner/name
	@$(PYTHON) docs/publish.py "$(REPOSITORY)"

wheel: .venv/.notebooks ## Build the wheel that is installed without this folder: dist/pwlib-*.whl
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and runs (never data/)
	rm -rf .venv .venv-classroom build pwlib.egg-info .pytest_cache .ruff_cache runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
