# Two commands: `make demo` and `make test`. Both make .venv first; nothing else is needed.
.PHONY: demo test docs bench bench-full clean

VENV := .venv
BIN := $(VENV)/bin

demo: $(VENV)/.installed
	$(BIN)/mint-mlx demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_examples.py

bench: $(VENV)/.installed
	$(BIN)/python eval/bench/bench.py
ifdef BASE
	$(BIN)/python eval/bench/beside.py --base $(BASE) --name $(notdir $(abspath $(BASE))) demo-moe layers
endif

bench-full: $(VENV)/.installed
	$(BIN)/python eval/bench/bench.py --full

$(VENV)/.installed: pyproject.toml bootstrap.sh
	sh bootstrap.sh $(VENV)
	touch $@

$(VENV)/.installed-dev: pyproject.toml bootstrap.sh
	sh bootstrap.sh $(VENV) dev
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
