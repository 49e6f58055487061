# make demo: train and evaluate a small FLIP on the embedded data set.
# make test: the test suite and the linters.  make test-slow: the tests that take longer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow test-quick lint clean

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[demo,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python main.py --config=configs/flip_emoji.py --workdir=$(DEMO)/run --config.data.tfds_dir=$(DEMO)/data
	$(BIN)/flip report --model=$(DEMO)/run \
		--queries="red heart,dog face,pizza,flag of Japan,rocket,guitar,crying face,soccer ball"

# Two processes, and each file in one of them, because its tests share what they train.
test: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# What depends most on the versions of Python and JAX, to try others: make test-quick PYTHON=python3.13 VENV=.venv-3.13
test-quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" tests/test_config.py tests/test_losses.py tests/test_memory.py tests/test_runtime.py \
		tests/test_checkpoint.py tests/test_metrics.py tests/models tests/data/test_tokenizer.py \
		tests/data/test_transforms.py tests/evaluators/test_linear_probe.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-* $(DEMO)
