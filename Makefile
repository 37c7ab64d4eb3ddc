# make upscale: enlarge the example photograph. make test: run the tests, lint and types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: upscale comparison test clean

upscale: $(VENV)/installed
	@mkdir -p output
	@$(BIN)/infdit upscale docs/osprey.png -o output/osprey_x4.png --scale 4 --overwrite

comparison: upscale
	@mkdir -p docs
	@$(BIN)/python scripts/compare.py docs/osprey.png output/osprey_x4.png docs/comparison.jpg

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

$(VENV)/installed: pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) output
