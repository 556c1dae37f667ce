"""Damage that is planted on purpose: a populated file system, a table of classes, campaigns."""
