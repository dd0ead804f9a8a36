.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## make .venv (PYTHON=... picks the interpreter)
	@scripts/setup

demo: setup ## convert, inspect and verify a small model
	.venv/bin/fuseport demo

test: setup ## run the tests
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 16 --dist worksteal

check: ## lint, types and tests
	scripts/check

bench: ## time kernels, models and other ways to do the same (toy sizes without a GPU)
	scripts/setup bench
	.venv/bin/python -m benchmarks.run

clean: ## remove .venv and everything that is generated
	rm -rf .venv .typecheck build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
