# Two commands do all set-up: `make demo` and `make test`. Each makes .venv where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
TEST_PROCESSES ?= 2
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow check bench wheel install install-test clean

demo: install
	$(BIN)/sfumato train recipes/tiny_prdp.yaml --run-dir $(RUN)
	$(BIN)/sfumato evaluate $(RUN) --json $(RUN)/evaluation.json
	@echo
	@echo "before and after, same prompts and noise:  $(RUN)/samples/before_after.png"
	@echo "numbers of the table above:                $(RUN)/evaluation.json"
	@echo "a line a round:                            $(RUN)/metrics.jsonl"
	@echo "weights for diffusers' load_lora_weights:  $(RUN)/export/"
	@echo "draw more:  $(BIN)/sfumato sample $(RUN) --prompt 'a red seven on a blue ground' --out seven.png"

test: check
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --no-loadscope-reorder

# One by one: what is slow starts several processes itself.
test-slow: install-test
	$(BIN)/python -m pytest -m slow

check: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

bench: install-test
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.scale

# What cluster/*.yaml install on every machine.
wheel: install
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	cp constraints.txt dist/

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable ".[test]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
