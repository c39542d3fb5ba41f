"""To the Hugging Face Hub: pushing checkpoints and datastores, and the cards that go with them."""

from .cards import DatastoreFacts, ModelDescription, render_datastore_card, render_model_card
from .facts import CardFacts, DataSource, Result
from .licences import KNOWN_LICENCES, licence_identifier
from .push import PushOptions, push_checkpoint, push_datastore, push_folder
from .scores import read_scores

__all__ = [
    "KNOWN_LICENCES",
    "CardFacts",
    "DataSource",
    "DatastoreFacts",
    "ModelDescription",
    "PushOptions",
    "Result",
    "licence_identifier",
    "push_checkpoint",
    "push_datastore",
    "push_folder",
    "read_scores",
    "render_datastore_card",
    "render_model_card",
]
