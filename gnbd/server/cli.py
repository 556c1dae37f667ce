"""`gnbd-server`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click
import structlog

from cluster.config import read_config_text
from cluster.errors import ConfigError
from cluster.tool_cli import ToolCommand
from gnbd.exports import decode_exports
from gnbd.identity import decode_server_token_untrusted
from gnbd.server.server_io import Server, check_before_start, join_cluster
from gnbd.tls_io import certificate_problem


def _configure_log() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


@click.command(cls=ToolCommand, name="gnbd-server")
@click.option("--join", "token", metavar="TOKEN", help="Store the identity given by the cluster.")
@click.option("--check-config", is_flag=True, help="Say whether the file can be served; no more.")
@click.argument("exports", type=click.Path(dir_okay=False))
def server_main(token: str | None, check_config: bool, exports: str) -> None:
    """Serve the exports of the file EXPORTS over NBD; with --join only store the token, once."""

    config = decode_exports(read_config_text(Path(exports)), exports)
    if check_config:
        check_before_start(config, Path(config.state_dir))
        if config.tls is not None and (problem := certificate_problem(config.tls)):
            raise ConfigError(problem)  # a start only says it: not everybody needs TLS
        print(f"{exports}: {len(config.exports)} exports, nothing wrong")
        return
    if token is not None:
        identity = decode_server_token_untrusted(token)
        new = join_cluster(Path(config.state_dir), identity)
        words = "joined" if new else "is already in"
        print(f"server {identity.name} {words} cluster {identity.cluster_name}")
        return
    _configure_log()
    Server(config, Path(exports)).run()


if __name__ == "__main__":
    server_main()
