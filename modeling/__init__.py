"""The code that travels with a checkpoint; see `recap_hf` for the public names."""
