"""Pipelines: opening, conditioning and sampling."""
