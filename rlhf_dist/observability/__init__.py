"""Metrics, terminal, trace, report and summary of a run: a leaf that imports nothing else of the package."""
