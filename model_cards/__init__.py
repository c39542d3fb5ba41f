"""Jinja templates of the cards that accompany pushed checkpoints and datastores (see `recap_hf.hub.cards`)."""
