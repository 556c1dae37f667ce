"""Other people's test suites on a mount: what runs, how long, and how their output is read.

Each suite exists twice: bounded for every test run, and whole for `python -m tests.foreign`.
A suite gives back what failed and what did not run, by the names its authors use; `judge`
compares both with the tables below. Nothing is skipped in silence: a test that did not run is
named in a table, or it is a failure; and what a table names must still be as the table says.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

PYTHON_TESTS = Path("/usr/lib/python3.11/test")
PYTHON_MODULES = (
    "test_os", "test_shutil", "test_tempfile", "test_mailbox", "test_dbm", "test_dbm_dumb",
    "test_dbm_gnu", "test_dbm_ndbm", "test_tarfile", "test_mmap", "test_fcntl", "test_posix",
)  # fmt: skip
# Slow, and either the same calls again in another class or hardly any calls of a file system.
PYTHON_LEFT_TO_WHOLE = (
    "test_walk_many_open_files", "test_fd_leak", "test.test_os.SpawnTests.*",
    "test.test_os.URandom*", "test.test_os.ForkTests.*", "test.test_posix.TestPosixSpawn*",
    "test.test_tarfile.CommandLineTest.*", "test.test_tarfile.Lzma*", "test.test_tarfile.Bz2*",
    "test.test_tarfile.Gzip*", "test.test_tarfile.*Stream*", "test.test_shutil.TestArchives.*",
    "test.test_mailbox.TestMH.*", "test.test_mailbox.TestMMDF.*", "test.test_mailbox.TestBabyl*",
    "test.test_dbm_dumb.*.test_random", "test_del_on_shutdown",
)  # fmt: skip

# Of the class "filesystem" of stress-ng; in the bounded run all of these at the same time.
STRESSORS = (
    "access", "chmod", "copy-file", "dentry", "dir", "fallocate", "fcntl", "fpunch", "hdd",
    "iomix", "rename", "utime", "xattr", "fiemap", "verity",
)  # fmt: skip

# (suite, name): why it fails or does not run here. It has to go on doing so.
DEVIATIONS = {
    ("stress-ng", "fiemap"): "FS_IOC_FIEMAP does not reach a FUSE file system: EOPNOTSUPP",
    ("stress-ng", "verity"): "cfs has no fs-verity: FS_IOC_ENABLE_VERITY gives an error",
    ("python", "test_sqlite3"): "Debian 12 leaves it out of libpython3.11-testsuite",
}
# Tests that do not run, by the reason they give: none of these is about the file system. Which
# of them turn up depends on the machine (groups, memory, terminal), so they may be missing.
NOT_ABOUT_THE_FILE_SYSTEM = re.compile(
    r"win32|windows|ntfs|macos|buildbots|tty|terminal|at least 2 groups|non-root|not enough memory"
    r"|stty|headers and trailers|os\.random\(\)|ch?flags|os\.lchmod|altsep|DAC_OVERRIDE"
    r"|dir_fd is supported|directory read-only|text mode|Berkeley DB|no name attribute"
    r"|os\.link to be missing|O_(EX|SH)LOCK|RWF_SYNC|32-bit",
    re.IGNORECASE,
)
# The first has nothing to do with the mount and needs a module of the kernel; the second binds /
# on itself until the memory is gone, which is why stress-ng itself does not run it unless forced.
STRESSORS_LEFT_OUT = ("binderfs", "bind-mount")


@dataclass
class Result:
    """What a suite says. `failed` and `skipped`: name to what the suite printed about it."""

    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)


def run(words: list[str], place: Path, deadline_s: int) -> tuple[int, str]:
    """The exit code and all output; the program finds nothing of the caller's environment."""
    environment = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "HOME": "/nonexistent"}
    environment |= {"TMPDIR": str(place), "LC_ALL": "C.UTF-8"}
    program = subprocess.Popen(
        words, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output = program.communicate(timeout=deadline_s)[0]
    except BaseException:
        # Its children too: they hold the pipe and the mount.
        os.killpg(program.pid, signal.SIGKILL)
        output = program.communicate()[0]
        print(output[-4000:])
        raise
    return program.returncode, output


def python(place: Path, whole: bool) -> Result:
    """The tests of CPython for files, in Debian's build of them."""
    report = place / "report.xml"
    ignored = () if whole else PYTHON_LEFT_TO_WHOLE
    words = ["/usr/bin/python3", "-m", "test", "-j2", "--timeout=300", f"--tempdir={place}"]
    words += [f"--junit-xml={report}", *(f"--ignore={pattern}" for pattern in ignored)]
    code, output = run([*words, *PYTHON_MODULES], place, 1800 if whole else 600)
    result = Result()
    ran: dict[str, int] = dict.fromkeys(PYTHON_MODULES, 0)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = case.get("name", "")
        kinds = {child.tag: (child.text or "") for child in case}
        if "skipped" in kinds:
            result.skipped[name] = kinds["skipped"]
        elif "failure" in kinds or "error" in kinds:
            result.failed[name] = kinds.get("failure", "") + kinds.get("error", "")
        elif (module := name.split(".")[1] if "." in name else "") in ran:
            ran[module] += 1
    # A module whose import fails for want of a package counts as success with regrtest.
    result.skipped |= {module: output[-2000:] for module, count in ran.items() if not count}
    if not (PYTHON_TESTS / "test_sqlite3").exists():
        result.skipped["test_sqlite3"] = "not in the package"
    if code and not result.failed:
        result.failed["test"] = output[-4000:]
    result.figures.append(f"{sum(ran.values())} tests passed, {len(result.skipped)} did not run")
    return result


def stress_ng(place: Path, whole: bool) -> Result:
    """stress-ng's class "filesystem", with its own verification."""
    words = ["stress-ng", "--verify", "--metrics-brief", f"--temp-path={place}"]
    if whole:
        listed = run(["stress-ng", "--class", "filesystem?"], place, 60)[1]
        asked = set(listed.partition("stressors:")[2].split()) - set(STRESSORS_LEFT_OUT)
        assert asked >= set(STRESSORS), listed
        left_out = ",".join(STRESSORS_LEFT_OUT)
        words += ["--class", "filesystem", "--exclude", left_out, "--sequential", "2", "-t", "8s"]
    else:
        asked = set(STRESSORS)
        words += ["-t", "4s", *(word for name in STRESSORS for word in (f"--{name}", "1"))]
    code, output = run(words, place, 3000 if whole else 600)
    result = Result()
    # A stressor that gave up is not among the metrics.
    metrics = re.findall(r"metrc: \[\d+\] (\S+) +(\d+) +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+", output)
    ran = {name: f"{operations} in {seconds} s" for name, operations, seconds in metrics}
    result.skipped |= dict.fromkeys(sorted(asked - set(ran)), output[-2000:])
    for line in re.findall(r"^.*fail: .*$", output, re.MULTILINE):
        found = re.search(r"fail: +\[\d+\] ([\w-]+):", line)
        result.failed[found[1] if found else "stress-ng"] = line
    if code not in (0, 3) and not result.failed:  # 3: a stressor was skipped
        result.failed["stress-ng"] = output[-4000:]
    result.figures.append(f"{len(ran)} of {len(asked)} stressors ran")
    result.figures += [f"  {name}: {text}" for name, text in ran.items()] if whole else []
    return result


def simple(name: str, code: int, output: str, wanted: str) -> Result:
    """The result of a program that says one line of figures at the end, or fails."""
    lines = [line.strip() for line in output.splitlines() if re.search(wanted, line)]
    if code or not lines:
        return Result(failed={name: f"exit code {code}\n{output[-4000:]}"})
    return Result(figures=lines[-1:])


def dbench(place: Path, whole: bool) -> Result:
    """The load of an office's file server; it stops at the first unexpected answer."""
    words = ["dbench", "-D", str(place), "-t", "60" if whole else "3", "4" if whole else "2"]
    return simple("dbench", *run(words, place, 600), r"^Throughput")


def fsmark(place: Path, whole: bool) -> Result:
    """Many small files by several threads, each one synced."""
    words = ["fs_mark", "-d", str(place), "-s", "4096", "-t", "2", "-S", "1"]
    words += ["-l", str(place / "log"), "-n", "5000" if whole else "100"]
    words += ["-L", "3" if whole else "1", "-D", "16"]
    return simple("fsmark", *run(words, place, 1800 if whole else 600), r"^ *\d+ +\d+ +4096 ")


def bonnie(place: Path, whole: bool) -> Result:
    """Stream, rewrite, seek, and (whole) many files; without the passes of one byte a call."""
    words = ["bonnie++", "-d", str(place), "-u", "root", "-f", "-m", "cfs", "-z", "1"]
    words += ["-s", "512", "-r", "256"] if whole else ["-s", "16", "-r", "8"]
    words += ["-n", "4:16384:0:16"] if whole else ["-n", "0"]
    return simple("bonnie++", *run(words, place, 1800 if whole else 600), r"^[\d.]+,2\.00a,cfs,")


SUITES: dict[str, Callable[[Path, bool], Result]] = {
    "python": python, "stress-ng": stress_ng, "dbench": dbench, "fsmark": fsmark,
    "bonnie++": bonnie,
}  # fmt: skip


def judge(suite: str, result: Result) -> list[str]:
    """What is not as it should be, a paragraph each; empty when all is well."""
    known = {name: reason for (of, name), reason in DEVIATIONS.items() if of == suite}
    wrong = [
        f"{suite}: {name} fails:\n{text}"
        for name, text in result.failed.items()
        if name not in known
    ]
    wrong += [
        f"{suite}: {name} did not run:\n{text}"
        for name, text in result.skipped.items()
        if name not in known and not (suite == "python" and NOT_ABOUT_THE_FILE_SYSTEM.search(text))
    ]
    wrong += [
        f"{suite}: {name} works now, take it out of DEVIATIONS ({reason})"
        for name, reason in known.items()
        if name not in result.failed and name not in result.skipped
    ]
    return wrong
