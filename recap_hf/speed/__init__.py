"""Measurements of speed: `recap bench` and its parts."""
