"""Every command of every tool: its help, and each of its arguments wrong in turn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cluster import errors
from tests.hostile.tools import TOOLS, USAGE, command_of, one_sentence, run, snapshot


def leaves(tool: str) -> Iterator[tuple[list[str], click.Command]]:
    """(words, command) of everything that can be typed."""

    def walk(words: list[str], command: click.Command) -> Iterator[tuple[list[str], click.Command]]:
        yield words, command
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from walk([*words, name], inner)

    yield from walk([], command_of(tool))


COMMANDS = [
    pytest.param(tool, words, command, id=" ".join([tool, *words]))
    for tool in TOOLS
    for words, command in leaves(tool)
]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No daemon, no state; and whatever is said here changes nothing."""
    for name in ("RUN", "STATE"):
        monkeypatch.setenv(f"CFS_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("CFS_LAB_DIR", str(tmp_path / "lab"))
    (tmp_path / "file").write_bytes(b"data")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    yield tmp_path
    assert snapshot(tmp_path) == before


def filled(command: click.Command, **given: str) -> list[str]:
    """Words that satisfy every required parameter of a command; `given` by name instead."""
    words: list[str] = []
    for parameter in sorted(command.params, key=lambda one: isinstance(one, click.Argument)):
        kind = parameter.type
        value = kind.choices[0] if isinstance(kind, click.Choice) else "x"
        value = given.get(parameter.name or "", str(getattr(kind, "min", value)))
        if not (parameter.required or parameter.name in given):
            continue
        if isinstance(parameter, click.Option):
            words.append(parameter.opts[0])
        words.append(value)
    return words


def outer(tool: str, words: list[str]) -> list[str]:
    """`words` with what the group itself wants."""
    return [*filled(command_of(tool)), *words] if words else words


@pytest.mark.parametrize(("tool", "words", "command"), COMMANDS)
def test_help_says_what_everything_does(tool, words, command):
    """--help and -h: a sentence for the command and one for each option."""
    for flag in ("--help", "-h"):
        ended = run(tool, *outer(tool, words), flag)
        assert (ended.code, ended.err) == (0, ""), ended
        assert f"Usage: {' '.join([tool, *words])}" in ended.out
    assert command.help
    assert command.help[0].isupper()
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"{parameter.opts} has no help"
    assert all(len(line) <= 100 for line in ended.out.splitlines())


@pytest.mark.parametrize(("tool", "words", "command"), COMMANDS)
def test_wrong_words_are_refused(tool, words, command):
    """An unknown option, an option without its value, a word too much, a word missing."""
    start = outer(tool, words)
    full = filled(command)
    tries: list[list[str]]
    if isinstance(command, click.Group):
        tries = [["--no-such-option"], ["no-such-command"]]
        tries += [[one.opts[0]] for one in command.params if not getattr(one, "is_flag", False)]
    else:
        tries = [full[:index] for index in range(len(full))]
        if not command.context_settings.get("ignore_unknown_options"):
            tries.append([*full, "--no-such-option"])
        if all(one.nargs == 1 for one in command.params):
            tries.append([*full, "one-too-many"])
    for attempt in tries:
        ended = run(tool, *start, *attempt)
        assert ended.code == USAGE.get(tool, 2), (attempt, ended)
        text = one_sentence(tool, ended)
        assert "see: " in text, (attempt, text)


def wrong_values(parameter: click.Parameter) -> list[str]:
    kind = parameter.type
    if isinstance(kind, click.Choice):
        return ["nonsense", ""]
    if isinstance(kind, click.IntRange | click.types.IntParamType):
        return ["x", "", "1.5", "99999999999999999999999"]
    return []


@pytest.mark.parametrize(("tool", "words", "command"), COMMANDS)
def test_wrong_values_are_refused(tool, words, command):
    """Each number and each choice of each command wrong in turn: the complaint names it."""
    for parameter in command.params:
        for value in wrong_values(parameter):
            attempt = filled(command, **{str(parameter.name): value})
            ended = run(tool, *outer(tool, words), *attempt)
            assert ended.code == USAGE.get(tool, 2), (attempt, ended)
            one_sentence(tool, ended)


def test_the_table_of_exit_codes_is_complete():
    """docs/exit-codes.md has a line for each code of cluster/errors.py."""
    text = (Path(__file__).parents[2] / "docs" / "exit-codes.md").read_text()
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert sorted(codes) == list(range(12))
    assert [line.split()[1] for line in text.splitlines() if re.match(r"\| \d", line)] == [
        *(str(code) for code in sorted(codes)), "130",
    ]  # fmt: skip
