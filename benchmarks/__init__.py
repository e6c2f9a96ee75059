"""Benchmarks: each prints a ratio to the raw driver that does the same work on the same server in the same run."""
