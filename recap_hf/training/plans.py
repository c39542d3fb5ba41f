"""Which captions are in which step of an epoch, and behind which prompt.

Everything random is keyed by seed, epoch and example, never by a running generator: a resumed run, and a run of
another number of processes, has the same steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .data import Clip

# Batches are cut from sorted runs of this number of batches: little padding, and still a random order.
_BATCHES_PER_RUN = 50
# Streams of random numbers that must differ: the order of an epoch, and the draws of an example (prompts, tasks).
ORDER, DRAW = 0, 1


class Row(NamedTuple):
    """One sequence of a batch: the number of a clip, and the numbers of its captions behind one prompt."""

    clip: int
    captions: tuple[int, ...]


def plan_epoch(
    clips: Sequence, lengths: Sequence[int], batch_size: int, seed: int, epoch: int, *, share_prompts: bool = False
) -> list[list[Row]]:
    """The steps of one epoch: every caption once, `batch_size` captions in a step (one may have fewer).

    Examples of a step are of similar length; the order of the steps is random.

    Args:
        clips: the training clips, with targets.
        lengths: for each clip, any measure of its prompt's length.
        batch_size: captions in a step.
        seed, epoch: the order is a function of them.
        share_prompts: keep the captions of a clip together, behind one prompt.
    """
    rng = np.random.default_rng([seed, ORDER, epoch])
    rows = []
    for clip, item in enumerate(clips):
        captions = tuple(rng.permutation(len(item.targets)).tolist())
        rows += [Row(clip, captions)] if share_prompts else [Row(clip, (caption,)) for caption in captions]
    rows = [rows[position] for position in rng.permutation(len(rows))]

    def length(row: Row) -> int:
        return lengths[row.clip] + sum(len(clips[row.clip].targets[caption]) for caption in row.captions)

    runs = np.cumsum([0, *(len(row.captions) for row in rows[:-1])]) // (_BATCHES_PER_RUN * batch_size)
    order = sorted(range(len(rows)), key=lambda number: (runs[number], length(rows[number])))
    batches = _cut([rows[number] for number in order], batch_size)
    return [batches[position] for position in rng.permutation(len(batches))]


def plan_validation(clips: Sequence[Clip], lengths: Sequence[int], batch_size: int) -> list[list[Row]]:
    """Every caption once, the captions of a clip behind one prompt, similar lengths together; no randomness."""
    rows = [Row(clip, tuple(range(len(item.targets)))) for clip, item in enumerate(clips)]
    return _cut(sorted(rows, key=lambda row: (lengths[row.clip], row.clip)), batch_size)


def _cut(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Batches of exactly `batch_size` captions; a row that does not fit is divided between two batches."""
    batches: list[list[Row]] = []
    room = 0
    for clip, captions in rows:
        while captions:
            if not room:
                batches.append([])
                room = batch_size
            part, captions = captions[:room], captions[room:]
            batches[-1].append(Row(clip, part))
            room -= len(part)
    return batches


def split_rows(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """A batch divided among processes and passes: consecutive rows, about equally many captions in each part."""
    captions = np.array([len(row.captions) for row in rows])
    middles = np.cumsum(captions) - captions / 2
    chosen = np.minimum(parts - 1, (middles * parts / captions.sum()).astype(int)).tolist()
    return [[row for row, part in zip(rows, chosen, strict=True) if part == number] for number in range(parts)]
