"""The version, in the one place that also the build reads."""

__version__ = "0.1.0"
