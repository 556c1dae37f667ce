"""The kernel's side of a mount: its messages, its caches, its callers."""
