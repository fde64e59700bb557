# `make demo` and `make test` do all their own set-up. Needs Python 3.11 or 3.12.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv
REPORT ?= reports/example/report.html
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: setup demo example test lint bench accessibility clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; set PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	touch $@

demo: $(READY)  ## build, validate, serve, sweep and compare three engines of the demo model
	$(BIN)/tkit run model_configs/demo.yaml --fresh

example: demo  ## keep the demo's report as the committed example
	mkdir -p reports/example
	cp reports/demo/report.html reports/demo/report.md reports/demo/report.csv reports/demo/pareto.png reports/example/
	sed -i 's|$(CURDIR)/||g' reports/example/report.*

# Three workers on two cores: half of the time a test waits for a server. The last long tests are shared out, too.
test: $(READY)
	$(BIN)/pytest -n 3 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

accessibility:  ## a report under axe in Chromium, light and dark, wide and narrow; needs npm and Chromium
	npm install --silent --prefix build/accessibility axe-core@4 playwright-core@1
	NODE_PATH=build/accessibility/node_modules node tests/report/accessibility.js \
		"file://$(abspath $(REPORT))" "$(shell command -v chromium || command -v google-chrome)"

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV)
