"""Measurements: ratios between things that are run in turn in one process."""
