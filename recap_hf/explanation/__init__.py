"""Explanations as pictures and texts, and the measurements that say whether they mean something."""
