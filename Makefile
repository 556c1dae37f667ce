# Two commands for a fresh machine: `make demo` and `make test`.
.PHONY: demo test setup lint bench

demo: setup
	.venv/bin/cfs-lab demo

# Three workers on two processors: half of the tests wait for something. tests/conftest.py says what may run beside what.
test: setup lint
	.venv/bin/python -m pytest -n 3 tests

setup:
	@packaging/setup

lint: setup
	@packaging/lint

bench: setup
	.venv/bin/python -m bench
