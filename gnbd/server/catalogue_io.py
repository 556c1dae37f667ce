"""Exports that come, go and change while a server runs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import structlog

from cluster.config import read_config_text
from cluster.errors import BusyError, StackError, UsageError
from gnbd.exports import (
    EXPORTS_MAX,
    Export,
    FilterSpec,
    check_export,
    check_tls,
    decode_exports,
    parse_filter,
)
from gnbd.server.backends_io import check_disks
from gnbd.server.export_io import Connection, ExportRuntime
from gnbd.server.filters.stack_io import changed_stack, filters_of
from gnbd.server.protection_io import convert
from gnbd.server.reload import plan_reload
from gnbd.server.service_io import STOP_S, Service
from gnbd.tls_io import certificate_problem, server_context

log = structlog.get_logger("gnbd")


class Catalogue:
    """One change at a time; the data path does not wait for it."""

    def __init__(self, service: Service, source: Path) -> None:
        """`source`: the exports file."""
        self._service = service
        self._source = source
        self._config = service.config
        """What of the file is in force: kept so at every step of a reload."""
        self._changing = threading.Lock()
        self._by_hand: set[str] = set()

    def close(self) -> None:
        """The server ends: no change begins any more, and one that runs has a while to end, because
        it may be opening or ending an export itself."""
        self._changing.acquire(timeout=STOP_S)

    def add(self, config: Export) -> None:
        """A new export, until the server ends. Raises StackError."""
        check_export(config, f"export {config.name!r}")
        check_tls(config, self._config.tls, f"export {config.name!r}")
        with self._changing:
            self._add(config)
            self._by_hand.add(config.name)

    def _add(self, config: Export) -> None:
        exports = self._service.exports
        if config.name in exports:
            raise UsageError(f"export {config.name!r} exists")
        if len(exports) >= EXPORTS_MAX:
            raise UsageError(f"there are {EXPORTS_MAX} exports, more cannot be")
        check_disks([*(e.config for e in list(exports.values())), config])
        self._service.open_export(config)
        log.info("export added", export=config.name)

    def resize(self, name: str, size_bytes: int) -> None:
        """Grow an export. Raises StackError, OSError."""
        with self._changing:
            self._service.resize(name, size_bytes)

    def remove(self, name: str, force: bool) -> None:
        """No more of this export; it returns when all that was acknowledged is durable. Raises
        StackError."""
        with self._changing:
            with self._service.lock:
                export = self._service.export(name)
                if export.connections and not force:
                    raise BusyError(
                        f"export {name!r} has {len(export.connections)} connections",
                        hint="--force cuts them off; see: gnbdctl connections",
                    )
                withdrawn = self._service.withdraw(name)
            self._by_hand.discard(name)
            self._end(*withdrawn)

    def _end(self, export: ExportRuntime, connections: list[Connection]) -> None:
        """What has been withdrawn executes nothing more, is durable and closed."""
        for connection in connections:
            if connection.export is export:
                connection.finished.wait()
        self._service.wait_drained()
        export.end()
        log.info("export removed", export=export.name)

    def change_filter(self, name: str, action: str, spec: FilterSpec) -> None:
        """`add`, `set` or `remove` one filter of an export. Raises StackError, OSError."""
        with self._service.lock:
            export = self._service.export(name)
            export.use(changed_stack(export.backend, action, spec))

    def set_integrity(self, name: str, on: bool) -> str:
        """Give an export an integrity area, or take it away; a sentence. Raises StackError,
        OSError."""
        with self._changing:
            export = self._service.export(name)
            wanted = export.config.integrity
            if name in self._by_hand:
                export.config.integrity = "kept"
            elif wanted == ("none" if on else "crc32c"):
                raise UsageError(
                    f'the exports file says integrity = "{wanted}" of {name!r}',
                    hint="change it there, then: gnbdctl reload",
                )
            return convert(self._service, export, on)

    def reload(self) -> str:
        """Make it so that the exports are those of the file; gives a sentence. What must be refused
        is refused before anything changes. Raises StackError."""
        with self._changing:
            wanted = decode_exports(read_config_text(self._source), str(self._source))
            plan = plan_reload(self._config, wanted, self._by_hand)
            tls = server_context(wanted.tls) if wanted.tls else None
            kept = [e.config for n, e in self._service.exports.items() if n not in plan.remove]
            check_disks([*kept, *plan.add])
            # What can still fail comes first: a disk that somebody else has.
            gone = [e for e in self._config.exports if e.name in plan.remove]
            freed = {os.path.realpath(e.path) for e in gone}
            late = [e for e in plan.add if os.path.realpath(e.path) in freed]
            self._add_all([e for e in plan.add if e not in late])
            self._service.tls = tls  # certificates that were renewed
            self._config.tls = wanted.tls
            for name in plan.remove:
                self._note(name, None)
                if self._is_of_the_file(name):
                    self._end(*self._service.withdraw(name))
            for before, after in plan.change:
                if self._is_of_the_file(after.name):
                    self._change(before, after)
                self._note(after.name, after)
            self._add_all(late)
            text = plan.summary()
            if wanted.tls is not None and (problem := certificate_problem(wanted.tls)):
                text += f"; {problem}"
            log.info("reloaded", what=text)
            return text

    def _is_of_the_file(self, name: str) -> bool:
        """Still served as such: gnbdctl may have removed it, and made another one of that name."""
        return name in self._service.exports and name not in self._by_hand

    def _note(self, name: str, export: Export | None) -> None:
        """So much is done, whatever fails after it."""
        kept = [e for e in self._config.exports if e.name != name]
        self._config.exports = [*kept, export] if export is not None else kept

    def _add_all(self, exports: list[Export]) -> None:
        """All, or none and the reason."""
        added = []
        try:
            for export in exports:
                self._add(export)
                added.append(export.name)
        except BaseException:
            for name in added:
                self._end(*self._service.withdraw(name))
            raise
        for export in exports:
            self._note(export.name, export)

    def _change(self, before: Export, after: Export) -> None:
        service = self._service
        export = service.export(after.name)
        size_bytes = after.size_bytes
        if size_bytes is not None and size_bytes > export.size_bytes:
            service.resize(after.name, size_bytes)
        with service.lock:
            if before.filters != after.filters:
                top = export.backend
                while found := filters_of(top):
                    top = changed_stack(top, "remove", found[-1].spec)
                for text in after.filters:
                    top = changed_stack(top, "add", parse_filter(text))
                export.use(top)
            export.config = after
        if after.integrity != "kept":
            convert(service, export, after.integrity == "crc32c")


def reload_or_complain(catalogue: Catalogue) -> None:
    """SIGHUP: there is nobody to tell but the log."""
    try:
        catalogue.reload()
    except (StackError, OSError) as error:
        hint = error.hint if isinstance(error, StackError) else ""
        log.error("not reloaded", reason=str(error), hint=hint)
