"""Captions for recap-tiny: a lexicon of sounds and a grammar that joins them."""
