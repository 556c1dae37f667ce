"""The structure that the other documents promise: purity of cores, sizes, layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["native", "cluster", "fencing", "gnbd", "dlm", "cvm", "cfs", "node", "lab"]
LAYERS = [["native"], ["cluster"], ["fencing"], ["gnbd", "dlm"]] + [
    [name] for name in ("cvm", "cfs", "node", "lab")
]
WORLDLY_IMPORTS = {
    "trio", "socket", "os", "time", "random", "threading", "subprocess", "select", "signal",
    "pyfuse3", "pyroute2", "asyncio",
}  # fmt: skip
WORLDLY_NAMES = {"cli.py", "daemon.py", "mkfs.py", "__main__.py"}
MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70


def modules() -> list[Path]:
    found: list[Path] = []
    for package in PACKAGES:
        found += sorted(p for p in (ROOT / package).rglob("*.py") if "_build" not in p.parts)
    return found


def is_worldly(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return (
        parts[0] in ("lab", "native")
        or path.name in WORLDLY_NAMES
        or path.stem.endswith(("_io", "_cli"))
    )


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_keeps_its_place(path: Path) -> None:
    """A core touches no world, imports go downward, modules and functions stay small."""
    source = path.read_text()
    tree = ast.parse(source)
    names = imported(tree)
    if not is_worldly(path):
        assert not names & WORLDLY_IMPORTS, "a pure module imports the world"
    package = path.relative_to(ROOT).parts[0]
    level = next(i for i, group in enumerate(LAYERS) if package in group)
    allowed = {package, *(p for group in LAYERS[:level] for p in group)}
    assert not (names & set(PACKAGES)) - allowed, "an import that goes up or sideways"
    assert len(source.splitlines()) <= MODULE_LINES_MAX
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES_MAX, node.name


def test_c_modules_are_small() -> None:
    """One idea in a C file as well."""
    for path in sorted((ROOT / "native" / "src").glob("*.[ch]")):
        assert len(path.read_text().splitlines()) <= MODULE_LINES_MAX, path.name
