# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up (scripts/setup: apt packages, .venv); see `make help`.
SHELL := /bin/bash
PY := .venv/bin/python
export PYTHONPATH := $(CURDIR)/src
export PYTHONDONTWRITEBYTECODE := 1
IMAGE_DIR ?= build/image
PYTEST_ARGS ?=

.PHONY: help setup image boot test test-unit test-native test-qemu lint format proto docs docs-provisioning provision-demo demo smoke bench clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: ## Install what is missing (apt packages, .venv); every other target does it first
	@scripts/setup

image: setup ## Build the signed reference image into build/image (cached by content)
	@$(PY) -m trustme_tools image build --out $(IMAGE_DIR) --development

boot: image ## Boot a device and attach to its core container; ONCE=1 powers off after RUNNING
	@$(PY) -m trustme_tools run $(IMAGE_DIR) $(if $(ONCE),--once)

provision-demo: image ## Boot a device, provision it, reboot it, show that the door is closed; power off
	@$(PY) scripts/provision_demo.py $(IMAGE_DIR)

demo: image ## Boot a device, install the example service, start it with its PIN, show it answering
	@$(PY) scripts/demo.py $(IMAGE_DIR)

smoke: image ## Smoke-test the image in a VM; writes build/smoke.xml, adds to build/testresults.json
	@$(PY) -m trustme_tools smoke $(IMAGE_DIR) --junit build/smoke.xml --oeqa build/testresults.json

test: setup ## Run all tests: unit, native boots, virtual machines
	@$(PY) -m pytest tests --junitxml=build/junit.xml $(PYTEST_ARGS)

test-unit: setup ## Run the pure tests only (seconds)
	@$(PY) -m pytest tests/unit $(PYTEST_ARGS)

test-native: setup ## Run the boot natively in a namespace sandbox with swtpm
	@$(PY) -m pytest tests/integration $(PYTEST_ARGS)

test-qemu: setup ## Run the virtual-machine tests (IMAGE_DIR is used when it holds an image)
	@$(PY) -m pytest tests/qemu $(if $(wildcard $(IMAGE_DIR)/manifest.json),--image-dir $(IMAGE_DIR)) $(PYTEST_ARGS)

lint: setup ## ruff, mypy --strict, pins of the Yocto builds
	@$(PY) scripts/check_kas.py
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: setup ## Format the code
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

proto: setup ## Regenerate the protocol messages
	@$(PY) scripts/generate_proto.py

docs: setup ## Regenerate the generated parts of docs/
	@$(PY) scripts/generate_docs.py

docs-provisioning: setup ## Run the sessions of docs/provisioning.md anew (needs root)
	@$(PY) scripts/provisioning_transcripts.py

bench: setup ## Measure the boot path and the control interface; writes build/bench.json
	@$(PY) scripts/bench.py --out build/bench.json

clean: ## Remove what was built in the checkout (the cache outside stays)
	rm -rf build
