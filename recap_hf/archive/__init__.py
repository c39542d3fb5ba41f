"""Archives of recordings: an index beside them that finds sounds by words or by sound, and near-duplicates."""

from .encoder import Places, SoundEncoder
from .sound_index import INDEX_NAME, SoundIndex

__all__ = ["INDEX_NAME", "Places", "SoundEncoder", "SoundIndex"]
