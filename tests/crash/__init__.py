"""Crash points: what a real cluster wrote, cut off anywhere, must mount and hold its promises."""
