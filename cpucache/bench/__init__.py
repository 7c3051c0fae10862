"""Benchmarks: ratios between alternatives that run in turn in one process."""
