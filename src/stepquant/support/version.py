"""The package's version, where the build and every record read it."""

__version__ = "0.1.0"
