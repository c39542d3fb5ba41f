"""Recordings of any length: block-wise reading, segmentation, timelines, live captions, subtitles."""
