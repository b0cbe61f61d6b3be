# Shopstream's verbs. Everything runs in .venv, made from requirements.lock on first use.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(READY): requirements.lock pyproject.toml
	@echo "setting up .venv from requirements.lock (a minute, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

setup: $(READY)  ## make .venv with everything pinned

sample: $(READY)  ## replay the bundled sample through an embedded Kafka; shows funnels and retention
	@$(BIN)/shopstream run --clickstream sample/clickstream.ndjson.gz --orders sample/orders.ndjson.gz \
	    --definitions sample/shopstream.toml --warehouse build/sample-warehouse --overwrite

demo: $(READY)  ## a generated shop, live on the terminal, until Ctrl-C
	@$(BIN)/shopstream demo

test: $(READY) lint  ## lint, then every test but the fault matrix, three files at a time: many of them wait
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/faults

test-faults: $(READY)  ## the fault matrix, on real Kafkas and ClickHouse servers, six files at a time; SHOPSTREAM_TEST_SEED repeats a run
	$(BIN)/python -m pytest -n 6 --dist loadfile tests/faults

kafka-cluster: $(READY)  ## three Kafka brokers on this machine until Ctrl-C; prints their addresses
	@$(BIN)/python -m embedded.cluster

lint: $(READY)  ## ruff, strict types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the whole worker and a plain Faust agent, one core each, side by side
	$(BIN)/python -m benchmarks.worker

lock: $(READY)  ## refresh requirements.lock from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra embedded --group dev \
	    --custom-compile-command "make lock" --upgrade pyproject.toml -o requirements.lock

clean:  ## remove what was built here
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup test-faults kafka-cluster sample demo test lint format bench lock clean
