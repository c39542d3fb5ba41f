"""Embeddings of audio moved to where those of captions are, for a captioner that was trained on embeddings of text.

The two lie apart in a CLAP's joint space. An embedding of audio is replaced by the mean of the embeddings of its
nearest captions, weighted by the softmax of their cosines (Kouzelis and Katsouros, arXiv 2309.12242; Li et al.,
"DRCap", arXiv 2410.09472).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.configuration_recap import EMBEDDING
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS
from recap_hf.modeling.encoder_recap import embedding_states
from recap_hf.modeling.generation_recap import RecapEncoderOutput, states_mask

NEAREST = 100


def project(
    queries: np.ndarray,
    datastore: Any,
    temperature: float,
    exclude_clip_ids: Sequence[Any] | None = None,
    exclude_texts: Sequence[Sequence[str]] | None = None,
) -> np.ndarray:
    """Each window's embedding as a mean of those of its 100 nearest captions.

    Args:
        queries: float32 of shape `(clips, windows, P)`, unit vectors; zeros where a clip has no such window.
        datastore ([`CaptionDatastore`]): of captions that are found by their text.
        temperature: the cosines are divided by it.
        exclude_clip_ids, exclude_texts: see [`CaptionDatastore.search`].

    Returns:
        Unit vectors of the same shape; zeros where nothing was found.

    Raises:
        ValueError: for a datastore that is searched by audio.
    """
    if datastore.keys == AUDIO_KEYS:
        raise ValueError("`projection_temperature` needs a datastore that is found by text, this one is by audio")
    windows = queries.shape[1]
    excluded = (
        [one for one in given for _ in range(windows)] if given else None
        for given in (exclude_clip_ids, exclude_texts)
    )
    flat = queries.reshape(-1, queries.shape[2])
    projected = np.zeros(flat.shape, dtype=np.float32)
    for row, hits in enumerate(datastore.search(flat, NEAREST, *excluded)):
        if hits:
            cosines = np.array([hit["score"] for hit in hits])
            weights = np.exp((cosines - cosines.max()) / temperature)
            mean = weights @ np.asarray(datastore.embeddings[np.array([hit["row"] for hit in hits])], dtype=np.float64)
            projected[row] = mean / np.linalg.norm(mean)
    return projected.reshape(queries.shape)


def check_states(config: Any) -> None:
    """Refuses a model of `config` that is conditioned on hidden states, by a `ValueError`."""
    if config.encoder_states != EMBEDDING:
        wanted = "needs a captioner that is conditioned on embeddings (encoder_states='embedding')"
        raise ValueError(f"`projection_temperature` {wanted}, this one is on {config.encoder_states!r} states")


def project_encoding(
    encoding: RecapEncoderOutput, config: Any, datastore: Any, temperature: float, **excluded: Any
) -> RecapEncoderOutput:
    """An encoding with projected states; its query embeddings stay. See `project`.

    Raises:
        ValueError: if a model of `config` is conditioned on hidden states.
    """
    check_states(config)
    projected = project(encoding.audio_embeds.float().cpu().numpy(), datastore, temperature, **excluded)
    states = embedding_states(torch.from_numpy(projected)).to(encoding.last_hidden_state)
    return RecapEncoderOutput(states, states_mask(states), encoding.audio_embeds)
