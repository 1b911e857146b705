# Every task of this repository; `make` lists them.

SHELL := /bin/bash
BIN := .venv/bin
# Two workers, each with a libvirtd and an API server of its own, use two cores. A file is the unit that a worker takes, in
# the order of `testpaths` in pyproject.toml; without a real world a single test is.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder
PURE := -n 2 --dist worksteal tests/unit tests/stores tests/model

.DEFAULT_GOAL := help
.PHONY: help install demo demo-down image unit check test coverage e2e engines chaos soak lint format model bench dashboard docs picture plugin release lock clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: ## install missing packages (Debian 12 or later; root or sudo)
	@sandbox/install.sh

demo: install ## start a guest and an API server, and back up the guest
	@$(BIN)/python -m sandbox.demo up

demo-down: ## stop and remove everything that `make demo` started, and nothing else
	@if [[ -x $(BIN)/python ]]; then $(BIN)/python -m sandbox.demo down; else echo "no demo is running: there is no .venv"; fi

image: install ## build the agent's image without a registry (root); elsewhere use the Dockerfile
	@$(BIN)/python -m sandbox.image

unit: install ## seconds: the tests of single functions and classes, nothing real
	@$(BIN)/pytest tests/unit tests/stores

check: install lint ## 6 minutes, before a commit: linters, types, layers, unit, model, one backup in each world
	@$(BIN)/pytest $(PURE)
	@$(BIN)/pytest $(BESIDE) -m check tests/hypervisor tests/cluster

test: install lint ## 20 minutes: every kind of fault once, on real parts, and a fixed sample of the kill points
	@$(BIN)/python -m sandbox.prepare tests
	@$(BIN)/pytest $(BESIDE)

coverage: install ## make test without the linters, then the lines that no test ran: takes a third longer
	@$(BIN)/python -m sandbox.prepare tests
	@$(BIN)/pytest $(BESIDE) --cov --cov-report=term:skip-covered

e2e: ## 6 minutes: the image and the manifests on a real node with a real guest, in namespaces of its own (root)
	@sandbox/install.sh node
	@$(BIN)/python -m sandbox.isolated $(BIN)/pytest -m e2e tests/e2e

engines: ## build the Dockerfile with docker and with podman (root); starts a private dockerd
	@sandbox/install.sh engines
	@$(BIN)/pytest -m engines tests/image

chaos: install ## hours: every kill point, the whole catalogue, the large model, ten minutes of random faults
	@$(BIN)/python -m sandbox.prepare tests chaos
	@VMBACKUP_TEST_BARRIER=31 $(BIN)/pytest -m 'not e2e and not engines' --timeout 1800
	@$(MAKE) --no-print-directory model soak

soak: install ## random backups under random faults: MINUTES=n (10) SEED=s
	@$(BIN)/python -m tests.chaos.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

lint: install ## style, types, layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: install ## apply the style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

model: install ## the model checker in its large settings
	@$(BIN)/python -m tests.model

bench: install ## measure the figures of the README
	@$(BIN)/python -m bench $(BENCH)

dashboard: install ## write the Grafana dashboard
	@$(BIN)/python manifests/components/monitoring/dashboard.py

docs: install ## write docs/reference.md, from the CRDs, the command lines and the metrics
	@$(BIN)/python docs/generate.py

picture: install ## draw the picture in the README, of `vmbackup top` with a real agent
	@$(BIN)/python -m docs.picture

plugin: install ## build the kubectl plugin, its archive and its manifest for krew, into dist/
	@$(BIN)/python -m plugins.build dist

release: install ## build a release into dist/ (root): manifests, chart, image, wheel, bill of materials, checksums
	@$(BIN)/python -m sandbox.release

lock: install ## renew requirements/*.lock from pyproject.toml
	@$(BIN)/uv --quiet lock --upgrade
	@for group in run build dev sandbox; do \
		case $$group in run) flags=--no-dev;; dev) flags="--group dev";; *) flags="--only-group $$group";; esac; \
		$(BIN)/uv --quiet export --frozen --no-emit-project --no-header --no-annotate $$flags >requirements/$$group.lock; \
	done

clean: demo-down ## remove .venv and the caches of this directory; keep the cache of programs
	@rm -rf .venv .coverage .pytest_cache .ruff_cache .import_linter_cache dist uv.lock
	@find . -name __pycache__ -prune -exec rm -rf {} +
