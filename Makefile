# The two commands are `make lab` and `make test`; everything else serves them.
PYTHON ?= python3
BIN := .venv/bin
# nbgrader has an environment of its own, without PyTorch: it only starts the kernels that run in .venv.
LABS := .venv-classroom/bin/python notebooks/labs/grading/course.py
export OMP_WAIT_POLICY ?= passive
# Every code cell runs; cells tagged nbval-check-output have to print what is stored. Two notebooks at a time, each on one
# core, are faster than one after the other on two.
NBVAL := -p tests.budgets --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval.cfg -n 2 --dist loadscope -q

.DEFAULT_GOAL := help
.PHONY: help setup lab lock test quick notebooks execute full html wheel lint publish-config format clean classroom release grade feedback classroom-test

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## Make .venv with all that the notebooks, the site and the tests need

.venv/.ready: pyproject.toml
	@$(PYTHON) install.py notebooks test site bench
	@touch .venv/.notebooks .venv/.site $@

# The extra of that name alone: .venv/.notebooks, .venv/.site.
.venv/.%: pyproject.toml
	@$(PYTHON) install.py $*
	@touch $@

# A bare container's only user is root, which JupyterLab must be told.
lab: .venv/.notebooks ## Open JupyterLab on the first notebook
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_why_structure.ipynb

lock: setup ## Write the versions installed in .venv to constraints.txt
	@{ echo "# Versions that the notebooks were last tested with, for LOCKED=1 make lab; written by make lock."; \
	$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check; } > constraints.txt

test: setup lint ## Run every test: library, command line, browser, notebooks
	$(BIN)/python -m pytest -m "not classroom"
	$(MAKE) notebooks

quick: setup lint ## Run the tests that take under two minutes
	$(BIN)/python -m pytest -m "not slow and not browser and not classroom" -x -q

notebooks: setup ## Run the notebooks' cells in the quick profile, and hold them to their budgets
	PWLIB_PROFILE=quick OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(NBVAL) --nbval-cell-timeout=600 notebooks/[0-9]*.ipynb

execute: setup ## Run notebooks and store their outputs, normalised: make execute NOTEBOOKS=notebooks/00*.ipynb
	CUDA_VISIBLE_DEVICES= $(BIN)/python docs/execute.py $(or $(NOTEBOOKS),notebooks/[0-9]*.ipynb)

full: setup ## Run the notebooks' cells in the full profile (hours on a CPU)
	PWLIB_PROFILE=full $(BIN)/python -m pytest $(NBVAL) --nbval-cell-timeout=14400 notebooks/[0-9]*.ipynb

classroom: .venv-classroom/.ready ## Make .venv-classroom, with nbgrader, for the labs

.venv-classroom/.ready: pyproject.toml .venv/.ready
	test -x .venv-classroom/bin/python || $(PYTHON) -m venv .venv-classroom
	.venv-classroom/bin/python -m pip install --quiet $(shell sed -n 's/^classroom = \[\(.*\)\]$$/\1/p' pyproject.toml)
	@touch $@

release: classroom ## Make the students' labs, without the answers: notebooks/labs/release (LAB=lab2: only that one)
	$(LABS) release $(LAB)

grade: classroom ## Grade what was handed in: make grade SUBMITTED=folder (UNSAFE=1: without isolation)
	$(LABS) grade "$(SUBMITTED)" $(if $(UNSAFE),--unsafe)

feedback: classroom ## Make the pages that go back to the students: notebooks/labs/feedback
	$(LABS) feedback $(LAB)

classroom-test: classroom ## Test the labs: release, grade and return them with made-up students
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/classroom -n 2 --dist loadgroup -q

html: .venv/.site ## Render the executed notebooks into one static site, build/html
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

format: setup ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and runs (never data/)
	rm -rf .venv .venv-classroom build pwlib.egg-info .pytest_cache .ruff_cache runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
