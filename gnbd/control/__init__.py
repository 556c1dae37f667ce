"""CONTROL sessions: what clusterd and gnbdctl ask of a server."""
