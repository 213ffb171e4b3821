"""The package's version, read by setuptools and written into every report."""

__version__ = "0.1.0"
