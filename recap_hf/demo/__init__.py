"""The web page of `recap demo`, and the same page as a Hugging Face Space.

`recordings` reads uploads within limits, `captioner` holds the model, `handlers` make parts of the page of both
(rendered by `views`), and `page` is the only module that uses Gradio.
"""

from .settings import DemoSettings, parse_datastores

__all__ = ["DemoSettings", "parse_datastores"]
