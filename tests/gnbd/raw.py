"""The client of tests that look at every request, logged in or not."""

from __future__ import annotations

from gnbd import messages as m
from lab.raw_client import RawClient

__all__ = ["RawClient", "logged_in", "login_result", "login_status"]


def logged_in(server, who, export="disk0", **more) -> RawClient:
    """In transmission, as an instance."""
    client = RawClient(server)
    result = client.login(who, export, **more)
    assert result.status == m.LOGIN_OK, result
    client.go(export)
    return client


def login_result(server, who, export="disk0", **more) -> m.LoginResult:
    """What a LOGIN is told."""
    with RawClient(server) as client:
        return client.login(who, export, **more)


def login_status(server, who, **more) -> int:
    """Whether it is granted."""
    return login_result(server, who, **more).status
