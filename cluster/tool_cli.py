"""The front door of every command-line tool: one sentence, a hint, an exit code; never a traceback
for what the world did.

    @click.group(cls=ToolGroup, name="clusterctl")
    def main() -> None: ...

Errors leave as `PROGRAM: sentence` and `  hint: what to do` on stderr. An exception that is none of
`StackError`, OSError and click's is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from cluster.errors import (
    EXIT_FAILED,
    EXIT_USAGE,
    NotPermittedError,
    StackError,
    os_failure,
)

EXIT_INTERRUPTED = 130
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def need_root(program: str, why: str) -> None:
    """Raise NotPermittedError unless this is root."""
    if os.geteuid() != 0:
        raise NotPermittedError(f"only root can run {program}", hint=why)


def flatten(group: BaseException) -> list[BaseException]:
    """The exceptions in a group, whatever nurseries they came through."""
    if not isinstance(group, BaseExceptionGroup):
        return [group]
    return [inner for one in group.exceptions for inner in flatten(one)]


class Tool(click.Command):
    """Mixed into a command or group: how it ends. Subclasses may say things another way."""

    usage_exit = EXIT_USAGE
    failed_exit = EXIT_FAILED

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", CONTEXT)
        super().__init__(*args, **kwargs)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, say what went wrong, leave the process."""
        kwargs |= {"standalone_mode": False, "prog_name": self.name}
        try:
            result = super().main(*args, **kwargs)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            self.leave(self.usage_exit)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx is not None else self.name
            self.complain(" ".join(error.format_message().split()), f"see: {path} --help")
            self.leave(self.usage_exit)
        except click.ClickException as error:
            self.complain(error.format_message(), "")
            self.leave(self.failed_exit)
        except click.Abort:
            self.complain("interrupted", "")
            self.leave(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has seen enough (`| head`).
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.leave(0)
        except (OSError, StackError, BaseExceptionGroup) as error:
            self.fail(error)
        self.leave(result if isinstance(result, int) else 0)

    def fail(self, error: BaseException) -> NoReturn:
        """Leave with the first error of the world in `error`; raise it if there is none."""
        found = flatten(error)
        for one in found:
            if not isinstance(one, StackError | OSError):
                raise error
        worldly = [os_failure(one) if isinstance(one, OSError) else one for one in found]
        first = next(one for one in worldly if isinstance(one, StackError))
        self.complain(first.message, first.hint)
        self.leave(self.code_of(first))

    def code_of(self, error: StackError) -> int:
        """The exit code for an error."""
        return error.exit_code

    def complain(self, message: str, hint: str) -> None:
        """One sentence and a hint on stderr."""
        click.echo(f"{self.name}: {message}", err=True)
        if hint:
            click.echo(f"  hint: {hint}", err=True)

    def leave(self, code: int) -> NoReturn:
        """End the process."""
        sys.exit(code)


class ToolCommand(Tool):
    """A tool without subcommands."""


class ToolGroup(Tool, click.Group):
    """A tool with subcommands."""
