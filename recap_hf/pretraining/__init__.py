"""Pretraining of small bases on one's own data: `recap pretrain clap` and `recap pretrain language-model`."""
