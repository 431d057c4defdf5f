"""Adapters: what the methods need to know of each architecture."""
