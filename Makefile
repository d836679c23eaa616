# Everything runs from a bare clone with only python3 (3.11 or newer): each target first makes .venv.
BIN := .venv/bin

.PHONY: help venv demo test tests test-all test-serving lint style types docs bench clean

help:
	@echo "make demo    real weights learn from real conversations on a CPU, in minutes"
	@echo "make test    lint, types, the docs' links and the CPU tests"
	@echo "make test-all  the same with the slow tests (some 25 minutes on 2 cores)"
	@echo "make test-serving   what is saved, served by vLLM on the CPU (its own environment, 3.5 GB)"
	@echo "make lint    ruff and mypy only"
	@echo "make docs    the docs as a site, in build/docs; a broken link fails it"
	@echo "make bench   time a training step beside plain Transformers (without a GPU: a tiny one, into runs/bench)"
	@echo "make clean   remove build and tool caches (.venv and runs stay)"

venv:
	@scripts/bootstrap.sh

demo: venv
	@scripts/demo.sh

# mypy and the tests at once: these often wait for processes that they start, which is why there are three workers on two
# cores as well. One torch thread a worker: small models gain nothing from more.
test: style docs
	@$(MAKE) --no-print-directory -j2 tests types

tests: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n 3 --dist worksteal --durations 20

test-all: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 3

test-serving: venv
	@scripts/test_serving.sh

lint: style types

style: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# At full size it takes more memory than a machine without a GPU has.
bench: venv
	$(BIN)/slipstream bench $(if $(shell nvidia-smi -L 2>/dev/null),,--tiny --device cpu --repeats 1 --output runs/bench)

clean:
	rm -rf dist build .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
