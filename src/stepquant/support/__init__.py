"""Shared helpers: the package's exception, progress output, registries, memory, atomic writes."""
