"""Deterministic simulation: all cores of N nodes and their servers in one event heap, one seed."""
