# Two commands on a fresh machine do everything: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

CORE := tests/test_packaging.py tests/modeling/test_modeling.py tests/modeling/test_features.py \
	tests/modeling/test_pipelines.py tests/modeling/test_fix_timestep.py tests/conversion/test_conversion.py \
	tests/selection/test_selection.py tests/cli/test_commands.py::test_select_writes_curve_picture_and_model
PICKS := tests/selection/test_scoring.py -k planted_timestep

.PHONY: app demo dist test test-min test-latest test-app test-slow test-clients test-docs conformance docs clean

demo: $(VENV)/installed
	$(BIN)/aselect compare sample sample --methods consensus_rank,hfr,grid,fixed --max-samples 300 \
		--pool-size 2 --timesteps 6 --output-dir runs/demo

# The page in a browser; `make app MODEL=runs/model` shows a model of yours.
app: $(VENV)/installed-app
	$(BIN)/aselect app $(MODEL)

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy aselect_hf aselect_cli
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	# The same picks by other instructions of the processor.
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PICKS)
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PICKS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

test-clients: $(VENV)/installed-clients
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients -n 2 tests/clients

# The browser is the system's, never a download of playwright's.
test-app: $(VENV)/installed-test-app
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium) || \
		echo "chromium cannot be installed: tests in a browser are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m app tests/app tests/hub tests/docs

# Follow the documentation: run every command and snippet that can be run here.
test-docs: $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m docs tests/docs

# The core of the suite on the lowest versions that setup.cfg declares, and on the newest; each in its own environment.
test-min: $(VENV)-min/installed
	OMP_NUM_THREADS=1 $(VENV)-min/bin/python -m pytest $(CORE)

test-latest: $(VENV)-latest/installed
	OMP_NUM_THREADS=1 $(VENV)-latest/bin/python -m pytest $(CORE)

conformance: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.run -q

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The pages: site/index.html"

# What PyPI gets: the source archive, and the wheel that is built from it.
dist: $(VENV)/installed
	$(INSTALL) build twine
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-min $(VENV)-latest build dist runs site *.egg-info

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable .
	touch $@

$(VENV)-min/installed: setup.cfg constraints-min.txt
	$(PYTHON) -m venv $(VENV)-min
	$(VENV)-min/bin/pip install --quiet --constraint constraints-min.txt --editable '.[dev]'
	touch $@

$(VENV)-latest/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)-latest
	$(VENV)-latest/bin/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-app: $(VENV)/installed
	$(INSTALL) --editable '.[app]'
	touch $@

$(VENV)/installed-test-app: $(VENV)/installed
	$(INSTALL) --editable '.[test-app]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) --editable '.[docs]'
	touch $@

$(VENV)/installed-clients: $(VENV)/installed-test
	$(INSTALL) --editable '.[dev,clients]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) --editable '.[dev]'
	touch $@
