"""The page to play with: `recap demo`, and the same page as a Hugging Face Space.

What a visitor sees is made in four layers, of which only the last knows Gradio: `recordings` reads uploads within
limits, `captioner` asks the model, `handlers` turns both into pieces of the page (rendered by `views`), and `page`
lays them out.
"""

from .settings import DemoSettings, parse_datastore

__all__ = ["DemoSettings", "parse_datastore"]
