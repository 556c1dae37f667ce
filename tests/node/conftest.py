import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "node_harness", Path(__file__).with_name("harness.py")
)
harness = importlib.util.module_from_spec(_spec)
sys.modules["node_harness"] = harness
_spec.loader.exec_module(harness)


@pytest.fixture
def cluster(tmp_path):
    made = harness.Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()
