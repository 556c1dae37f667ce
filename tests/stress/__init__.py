"""The stress program: see `python -m tests.stress --help`."""
