"""Recipes of models, in the repository and not installed."""
