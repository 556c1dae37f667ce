"""The client of exports: one engine for all users of a disk."""
