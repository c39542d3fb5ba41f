"""Timelines: what happens when in a recording, written for players, annotators and readers."""
