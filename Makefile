# make demo | test | test-fast | test-gpu | bench | bench-checks | bench-exchange | bench-serving | patch-lint | patch-export | lint | format | clean
#
# demo and test install what they need into .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= .cache/bench
STAMP := $(VENV)/.installed
SOURCES := python test/srt benchmark

# Servers start three times faster with .pyc files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-gpu bench bench-checks bench-exchange bench-serving patch-lint patch-export lint format clean

demo: $(STAMP)
	$(BIN)/python -m sglang_dcp.demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not server"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -s test/srt/test_*_gpu*.py test/srt/test_split_lse.py

bench: $(STAMP)
	$(BIN)/python benchmark/bench_decode.py $(OUT)/decode.csv $(ARGS)

bench-checks: $(STAMP)
	$(BIN)/python benchmark/bench_decode.py $(OUT)/fill.csv --check-fill
	$(BIN)/python benchmark/bench_decode.py $(OUT)/off.csv --check-off

bench-exchange: $(STAMP)
	$(BIN)/python benchmark/bench_exchange.py $(OUT)/exchange.csv $(ARGS)

bench-serving: $(STAMP)
	$(BIN)/python benchmark/bench_serving.py $(OUT)/serving.jsonl

patch-lint: $(STAMP)
	$(BIN)/python -m sglang_dcp patch lint

patch-export: $(STAMP)
	$(BIN)/python -m sglang_dcp patch export --target $(CHECKOUT) --wheel $(WHEEL)

lint: $(VENV)/.lint patch-lint
	$(BIN)/black --check -q $(SOURCES)
	$(BIN)/isort --check -q $(SOURCES)
	$(BIN)/flake8 $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/isort -q $(SOURCES)
	$(BIN)/black -q $(SOURCES)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(None if (3, 11) <= v <= (3, 12) else \
	  "sglang-dcp needs Python 3.11 or 3.12, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[test]'
	@touch $@

$(VENV)/.lint: $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[lint]'
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist python/*.egg-info
