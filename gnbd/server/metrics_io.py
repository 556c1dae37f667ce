"""What a gnbd-server tells Prometheus: the state at the moment of each scrape."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.errors import os_failure
from cluster.holders_io import bind
from gnbd.server.export_io import CACHE_GENERATION_ERRORS
from gnbd.server.filters.stack_io import filters_of
from gnbd.server.service_io import Service

_REQUESTS = ("reads", "writes", "flushes")
_BYTES = {"read_bytes": "read", "written_bytes": "written"}
_REFUSED = {"refused": "any", "refused_writes": "write"}


class _Exports(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        exports = list(self._service.exports.values())
        size = GaugeMetricFamily("gnbd_export_size_bytes", "Its size", labels=["export"])
        open_ = GaugeMetricFamily("gnbd_connections", "In transmission", labels=["export"])
        limit = GaugeMetricFamily("gnbd_connections_max", "Its limit", labels=["export"])
        lost = CounterMetricFamily("gnbd_flush_failures", "In this life", labels=["export"])
        requests = CounterMetricFamily("gnbd_requests", "Answered", labels=["export", "kind"])
        moved = CounterMetricFamily("gnbd_bytes", "Moved", labels=["export", "direction"])
        refused = CounterMetricFamily(
            "gnbd_refused_requests", "Sent after the bar of their sender", labels=["export", "kind"]
        )
        wrong = CounterMetricFamily(
            "gnbd_checksum_mismatches", "Blocks that were not what was written", labels=["export"]
        )
        regions = GaugeMetricFamily(
            "gnbd_integrity_regions", "Of the integrity area", labels=["export", "state"]
        )
        seen = GaugeMetricFamily(
            "gnbd_filter", "What a filter reports", labels=["export", "filter", "what"]
        )
        for export in exports:
            name = export.name
            counters = export.shared.counters()
            size.add_metric([name], export.size_bytes)
            open_.add_metric([name], len(export.connections))
            limit.add_metric([name], export.config.connections_max)
            lost.add_metric([name], export.cache_generation % CACHE_GENERATION_ERRORS)
            for key in _REQUESTS:
                requests.add_metric([name, key], counters[key])
            for key, direction in _BYTES.items():
                moved.add_metric([name, direction], counters[key])
            for key, kind in _REFUSED.items():
                refused.add_metric([name, kind], counters[key])
            if states := export.integrity_counters():
                wrong.add_metric([name], states["mismatches"])
                regions.add_metric([name, "flux"], states["flux_regions"])
                regions.add_metric([name, "unsettled"], states["unsettled_regions"])
            # Two samples of one name would spoil the whole scrape.
            for item in {f.kind: f for f in filters_of(export.backend)}.values():
                for what, value in item.report().items():
                    seen.add_metric([name, item.kind, what], value)
        yield from (size, open_, limit, lost, requests, moved, refused, wrong, regions, seen)
        admission = self._service.admission
        yield GaugeMetricFamily("gnbd_epoch", "The installed one", value=admission.epoch)
        yield GaugeMetricFamily(
            "gnbd_serving", "1: logged-in instances are served", value=int(admission.serving)
        )


def _address(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host.strip("[]"), int(port)


def check_metrics(place: str) -> None:
    """Refuse an ADDRESS:PORT that somebody has, before anything is made. Raises StackError."""
    host, port = _address(place)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bind(sock, host, port)
    sock.close()


def serve_metrics(service: Service, place: str) -> None:
    """Answer scrapes at ADDRESS:PORT in a thread. Raises StackError."""
    host, port = _address(place)
    registry = CollectorRegistry()
    registry.register(_Exports(service))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise os_failure(error, f"cannot serve metrics at {place}") from error
