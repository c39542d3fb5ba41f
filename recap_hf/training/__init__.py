"""Training a RECAP captioner: `recap train`, or `accelerate launch train.py`."""
