# Two commands for a fresh machine: `make demo` and `make test`.
.PHONY: demo test setup lint bench

demo: setup
	.venv/bin/cfs-lab demo

test: setup lint
	.venv/bin/python -m pytest tests

setup:
	@packaging/setup

lint: setup
	@packaging/lint

bench: setup
	.venv/bin/python -m bench
