"""In-tree PEP 517 backend: writes the cffi C sources, then delegates to setuptools.

The extension modules are declared once, in `[tool.setuptools] ext-modules` of pyproject.toml; the
declarations that Python sees stand in `<module>.cdef` beside this file. `python backend.py`
compiles the same modules in place, only if something changed, and needs no setuptools.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Extension = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
GENERATED = ROOT / "build" / "native"


def extensions() -> list[Extension]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        declared: list[Extension] = tomllib.load(file)["tool"]["setuptools"]["ext-modules"]
        return declared


def short_name(extension: Extension) -> str:
    return str(extension["name"]).rpartition(".")[2]


def generate(extension: Extension) -> None:
    """Write build/native/_NAME.c from native/_build/_NAME.cdef (keeps an unchanged file)."""
    from cffi import FFI

    name = short_name(extension)
    ffi = FFI()
    ffi.cdef((HERE / f"{name}.cdef").read_text())
    ffi.set_source(extension["name"], f'#include "src/{name.lstrip("_")}.h"')
    GENERATED.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(GENERATED / f"{name}.c"))


def _generate_all() -> None:
    for extension in extensions():
        generate(extension)


# --- the PEP 517 and PEP 660 hooks -----------------------------------------------------------


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return []


get_requires_for_build_sdist = get_requires_for_build_wheel
get_requires_for_build_editable = get_requires_for_build_wheel


def _delegate(hook: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        from setuptools import build_meta  # type: ignore[import-untyped]

        _generate_all()
        return getattr(build_meta, hook)(*args, **kwargs)

    call.__name__ = hook
    return call


prepare_metadata_for_build_wheel = _delegate("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _delegate("prepare_metadata_for_build_editable")
build_wheel = _delegate("build_wheel")
build_sdist = _delegate("build_sdist")
build_editable = _delegate("build_editable")


# --- in place --------------------------------------------------------------------------------


def fingerprint(extension: Extension) -> str:
    name = short_name(extension)
    inputs = [ROOT / path for path in extension["sources"] if path != f"build/native/{name}.c"]
    inputs += [*(ROOT / "native" / "src").glob("**/*.h"), HERE / f"{name}.cdef", Path(__file__)]
    digest = hashlib.sha256(repr((sorted(extension.items()), sys.version)).encode())
    for path in sorted(inputs):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compile_in_place(extension: Extension, target: Path) -> None:
    generate(extension)
    variables = sysconfig.get_config_vars()
    include_dirs = [sysconfig.get_paths()["include"], *extension.get("include-dirs", [])]
    partial = target.with_name(target.name + f".{os.getpid()}.new")
    command = [
        *(os.environ.get("CC") or variables["CC"]).split(),
        *["-shared", "-fPIC", "-DNDEBUG", "-g", "-fwrapv"],
        *extension.get("extra-compile-args", []),
        *[f"-I{path}" for path in include_dirs],
        *extension["sources"],
        *extension.get("extra-link-args", []),
        *[f"-l{library}" for library in extension.get("libraries", [])],
        *["-o", str(partial)],
    ]
    try:
        subprocess.run(command, cwd=ROOT, check=True)
        partial.replace(target)  # running processes keep the old file
    finally:
        partial.unlink(missing_ok=True)


def build_in_place(force: bool = False) -> int:
    GENERATED.mkdir(parents=True, exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = 0
    with open(GENERATED / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for extension in extensions():
            name = short_name(extension)
            target = ROOT / "native" / f"{name}{suffix}"
            stamp = GENERATED / f"{name}{suffix}.stamp"
            wanted = fingerprint(extension)
            if not force and target.exists() and stamp.exists() and stamp.read_text() == wanted:
                continue
            print(f"native: compiling {extension['name']}", file=sys.stderr, flush=True)
            compile_in_place(extension, target)
            stamp.write_text(wanted)
            built += 1
    return built


if __name__ == "__main__":
    try:
        build_in_place(force="--force" in sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"native: the compiler failed with status {error.returncode}")
