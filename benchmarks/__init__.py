"""Measurements; README.md says what each script measures and how to run it."""
