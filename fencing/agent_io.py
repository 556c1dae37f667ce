"""Fence agents of the distribution: `off` and then `status`, by exec in a clean environment.

The protocol (FenceAgentAPI): parameters as `key=value` lines on stdin; exit code 0 is success,
`status` gives 2 for off. A secret is never on the command line, in the environment, or in what is
handed on: what an agent says is searched for it. An attempt that is cancelled kills the agent with
all its children.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import trio

from cluster.errors import ConfigError
from fencing.methods import Outcome, Verdict
from fencing.settings import MethodConfig, decode_secrets

AGENT_DIRECTORY = Path("/usr/sbin")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/"}
OUTPUT_BYTES_MAX = 16 << 10
STATUS_ON, STATUS_OFF = 0, 2
FORBIDDEN_MODE = 0o077


class Said:
    """How an agent ended and the last line that it said, without secrets."""

    def __init__(self, code: int, output: bytes, secrets: list[str]) -> None:
        self.code = code
        text = output.decode(errors="replace")
        for secret in sorted(secrets, key=len, reverse=True):
            if secret:
                text = text.replace(secret, "***")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.text = lines[-1] if lines else "it said nothing"


def read_secrets(path: str) -> dict[str, str]:
    """The file of `secrets`. Raises ConfigError also when others than its owner may read it."""
    if not path:
        return {}
    try:
        with Path(path).open() as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the secrets in {path}: {error}") from error
    if mode & FORBIDDEN_MODE:
        raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    return decode_secrets(text, path)


class Agent:
    """One `[methods.NAME]` of kind agent."""

    def __init__(self, config: MethodConfig, directory: Path = AGENT_DIRECTORY) -> None:
        self._config = config
        self._path = directory / config.agent

    async def fence(self, node: str) -> Outcome:
        """Switch a node off, and look whether it is. Raises ConfigError."""
        off = await self._act("off", node)
        if off.code != 0:
            return Outcome(Verdict.FAILED, f"{self._config.agent} off: {off.text}")
        status = await self._act("status", node)
        if status.code == STATUS_OFF:
            plug = self._plug(node)
            return Outcome(Verdict.PROVEN, f"{self._config.agent}: off, and plug {plug} is off")
        says = "it is still on" if status.code == STATUS_ON else f"status: {status.text}"
        return Outcome(Verdict.FAILED, f"{self._config.agent} off succeeded, but {says}")

    async def unfence(self, node: str) -> str:
        """Switch a node on; what went wrong, or an empty text. Raises ConfigError."""
        on = await self._act("on", node)
        return "" if on.code == 0 else f"{self._config.agent} on: {on.text}"

    def _plug(self, node: str) -> str:
        return self._config.ports.get(node, node)

    async def _act(self, action: str, node: str) -> Said:
        secrets = await trio.to_thread.run_sync(read_secrets, self._config.secrets)
        lines = {key: _text(value) for key, value in self._config.parameters.items()}
        lines |= secrets
        lines |= {"action": action, "nodename": node, "plug": self._plug(node)}
        data = "".join(f"{key}={value}\n" for key, value in lines.items()).encode()
        try:
            process = await trio.lowlevel.open_process(
                [str(self._path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(
                f"cannot run {self._path}: {error.strerror}", hint="install fence-agents"
            ) from error
        return await _talk(process, data, list(secrets.values()))


async def _talk(process: trio.Process, data: bytes, secrets: list[str]) -> Said:
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    output = bytearray()
    code: int | None = None

    async def write() -> None:
        try:
            await stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it reads no parameters; its exit code will tell
        await stdin.aclose()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            async for piece in stdout:
                output += piece
                del output[:-OUTPUT_BYTES_MAX]
            code = await process.wait()
    finally:
        if code is None:
            # Nobody waits any more. The agent may have ended and its children not; their group
            # keeps its number, since nobody has taken the agent's exit code yet.
            os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
    return Said(code, bytes(output), secrets)


def _text(value: str | int | bool) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
