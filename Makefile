# What there is to do here; `make` alone lists it.

SHELL := /bin/bash
BIN := .venv/bin
# Files of tests run beside each other, each worker with a libvirtd and an API server of its own: two use two cores up.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo demo-down image test coverage e2e engines unit chaos soak lint format model bench dashboard docs picture plugin release lock clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: ## install what is missing (Debian 12 or later; root or sudo)
	@sandbox/install.sh

demo: install ## a live guest, an API server, and a backup of the one declared in the other
	@$(BIN)/python -m sandbox.demo up

demo-down: ## end and remove what `make demo` started, and only that
	@if [[ -x $(BIN)/python ]]; then $(BIN)/python -m sandbox.demo down; else echo "without .venv there is no demo"; fi

image: install ## build the agent's image here, without a registry (root); Dockerfile builds it anywhere else
	@$(BIN)/python -m sandbox.image

test: install lint ## everything: linters, types, layers, and every test on real parts
	@$(BIN)/python -m sandbox.prepare tests
	@$(BIN)/pytest $(BESIDE)

coverage: install ## the same, and which lines nothing has run: takes a third longer
	@$(BIN)/python -m sandbox.prepare tests
	@$(BIN)/pytest $(BESIDE) --cov --cov-report=term:skip-covered

e2e: ## the image and the manifests on a real node with a real guest, in namespaces of its own (root)
	@sandbox/install.sh node
	@$(BIN)/python -m sandbox.alone $(BIN)/pytest -m e2e tests/e2e

engines: ## the Dockerfile built by docker, and by podman (root); dockerd is started for it alone
	@sandbox/install.sh engines
	@$(BIN)/pytest -m engines tests/image

unit: install ## the fast tests: seconds, nothing real
	@$(BIN)/pytest tests/unit

chaos: install ## every failure: each kill point, the whole catalogue, what takes long too; then ten minutes of random ones
	@$(BIN)/pytest -m 'chaos or not (e2e or engines)' --timeout 1800 tests/chaos tests/hypervisor
	@$(MAKE) --no-print-directory soak

soak: install ## random backups under random faults: MINUTES=n SEED=s
	@$(BIN)/python -m tests.chaos.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

lint: install ## style, types, layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: install ## apply the style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

model: install ## the model checker in its large settings: minutes
	@$(BIN)/python -m tests.model

bench: install ## measure the figures of the README
	@$(BIN)/python -m bench $(BENCH)

dashboard: install ## write the Grafana dashboard anew
	@$(BIN)/python manifests/components/monitoring/dashboard.py

docs: install ## docs/reference.md, from the CRDs, the command lines and the metrics
	@$(BIN)/python docs/generate.py

picture: install ## the picture in the README, of `vmbackup top` with a real agent
	@$(BIN)/python -m docs.picture

plugin: install ## the kubectl plugin, its archive and its manifest for krew, into dist/
	@$(BIN)/python -m plugins.build dist

release: install ## what a release carries, into dist/ (root): manifests, chart, image, wheel, bill of materials, sums
	@$(BIN)/python -m sandbox.release

lock: install ## renew requirements/*.lock from pyproject.toml
	@$(BIN)/uv --quiet lock --upgrade
	@for group in run build dev sandbox; do \
		case $$group in run) flags=--no-dev;; dev) flags="--group dev";; *) flags="--only-group $$group";; esac; \
		$(BIN)/uv --quiet export --frozen --no-emit-project --no-header --no-annotate $$flags >requirements/$$group.lock; \
	done

clean: demo-down ## remove what was built here (.venv and caches; the cache of programs stays)
	@rm -rf .venv .coverage .pytest_cache .ruff_cache .import_linter_cache dist uv.lock
	@find . -name __pycache__ -prune -exec rm -rf {} +
