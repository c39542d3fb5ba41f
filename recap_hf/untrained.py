"""Captioning without a trained captioner: see `recap assemble`.

The language model continues the prompt of retrieved captions without any sight of the recording. CLAP then chooses, of
what it wrote and of the retrieved captions, the one that is nearest to the recording.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


def with_retrieved(
    captioner: Any,
    encoding: Any,
    prompts: Any,
    retrieved: Sequence[Sequence[dict[str, Any] | str]],
    sequences: torch.LongTensor,
    scores: list[float],
) -> tuple[torch.LongTensor, list[float]]:
    """The generated sequences of each recording and, behind them, its retrieved captions as if they were generated.

    Args:
        captioner ([`Captioner`]), encoding, prompts, retrieved: as in [`Captioner.decode`].
        sequences, scores: what was generated, those of a recording together.

    Returns:
        Sequences `(clips * (generated + most retrieved), length)`, and the language model's score of each.
    """
    clips, start, most = len(retrieved), prompts["decoder_input_ids"].shape[1], max(map(len, retrieved))
    if not most:
        return sequences, scores
    own = sequences.view(clips, -1, sequences.shape[1])
    # A recording with fewer captions has its own best one again.
    targets = [[best[start:]] * most for best in own[:, 0]]
    for row, hits in enumerate(retrieved):
        texts = [hit if isinstance(hit, str) else hit["caption"] for hit in hits]
        targets[row][: len(hits)] = [own.new_tensor(captioner.processor.encode_caption(text)) for text in texts]
    end = captioner.model.config.eos_token_id
    padded = pad_sequence([one for row in targets for one in row], batch_first=True, padding_value=end)
    added = torch.cat([own[:, 0, :start].repeat_interleave(most, dim=0), padded], dim=1)
    new = torch.tensor(captioner.model.score_captions(encoding, added, prompts)).view(clips, -1)
    length = max(own.shape[2], added.shape[1])
    both = [pad(part, (0, length - part.shape[2]), value=end) for part in (own, added.view(clips, most, -1))]
    both_scores = torch.cat([torch.tensor(scores).view(clips, -1), new], dim=1)
    return torch.cat(both, dim=1).flatten(0, 1), both_scores.flatten().tolist()
