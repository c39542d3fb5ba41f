"""Measurements of recap_hf; not installed. Run from the repository root: `python -m benchmarks.NAME --help`."""
