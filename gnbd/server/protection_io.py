"""Integrity areas that come and go while their exports are served, and scrubs."""

from __future__ import annotations

from pathlib import Path

import structlog

from gnbd import messages as m
from gnbd.server.export_io import ExportRuntime
from gnbd.server.integrity import Header
from gnbd.server.integrity_io import area_path, make_area, open_grown, remove_area
from gnbd.server.service_io import Service

log = structlog.get_logger("gnbd")


def convert(service: Service, export: ExportRuntime, on: bool) -> str:
    """Give the export an integrity area, or take it away, under its clients; a sentence. Nothing is
    believed of a disk that had none until its sums have been computed from it. Raises StackError,
    OSError."""
    if on == (export.integrity is not None):
        return f"the integrity of {export.name} is {'on' if on else 'off'} already"
    path = area_path(Path(service.config.state_dir), export.name)
    if on:
        _put_on(service, export, path)
        return "on; the sums are being computed"
    _take_off(service, export, path)
    return "off"


def _put_on(service: Service, export: ExportRuntime, path: Path) -> None:
    header = Header(export.name, export.config.path, export.disk.size_bytes)
    make_area(path, header, settled=False)
    with service.lock:
        integrity = open_grown(path, header, export.disk.fd, export.size_bytes)  # by now
        export.use_integrity(integrity)
        service.renew_gates(export)
    try:
        _wait_for_others(service, export)
    finally:
        # Only now: a write that knew nothing of the area may have come after the sum of its block.
        export.keep(lambda: service.flush(export), service.damages)
    log.info("integrity on", export=export.name)


def _take_off(service: Service, export: ExportRuntime, path: Path) -> None:
    remove_area(path)  # first: sums that nobody keeps up must not be found by the next start
    export.stop_upkeep()  # nobody settles
    with service.lock:
        before = export.integrity
        assert before is not None
        # Requests that have begun go by the area still, beside others that do not keep it up.
        before.area.doubt(every=True)
        export.use_integrity(None)
        service.renew_gates(export)
    export.stop_upkeep()
    try:
        _wait_for_others(service, export)
    finally:
        before.close(False)
    log.info("integrity off", export=export.name)


def _wait_for_others(service: Service, export: ExportRuntime) -> None:
    """Nothing executes any more that began before: no request, no flush; also when it raises
    OSError, because flushes wait for each other."""
    service.wait_drained()
    if not export.backend.read_only:
        service.flush(export)


def steer_scrub(export: ExportRuntime, action: str, rate_bytes_s: int) -> m.ScrubReport:
    """`start`, `stop` or `status` of a scrub. Raises UsageError, BusyError."""
    if action == "start":
        return export.start_scrub(rate_bytes_s).report()
    scrub = export.scrub
    if action == "stop" and scrub is not None:
        scrub.stop()
    if scrub is None:
        return m.ScrubReport(export.name, "never", export.size_bytes)
    return scrub.report()
