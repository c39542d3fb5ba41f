"""From clips and captions to batches: what is in which step, in which order, behind which prompt.

Everything random here is keyed by seed, epoch and example, never by a running generator: a resumed run, and a run on
another number of processes, sees the same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .features import FeatureStore
from .neighbours import Neighbours

# Batches are cut from sorted runs of so many batches: nearly no padding, and still a random order.
_BATCHES_PER_RUN = 50
# Streams of random numbers that must not meet: the order of an epoch, the draws of an example.
_ORDER, _DRAW = 0, 1


@dataclass
class Clip:
    """A clip in training: where its features are, and its captions as texts and as target tokens (end token last)."""

    key: str
    clip_id: str
    captions: list[str]
    targets: list[list[int]]


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: a clip and the captions of it that stand behind one prompt."""

    clip: int
    captions: tuple[int, ...]


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are made from neighbours.

    Args:
        k: captions in a prompt.
        draw_from: draw them from so many nearest; 0 takes the k nearest.
        shuffle: random order instead of most similar first.
        audio_dropout: share of rows whose audio is hidden.
        prompt_dropout: share of rows that get no captions in their prompt.
        seed: of the draws.

    Raises:
        ValueError: a share is not between 0 and 1.
    """

    k: int
    draw_from: int = 0
    shuffle: bool = False
    audio_dropout: float = 0.0
    prompt_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("audio_dropout", "prompt_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")


def tokenize_targets(captions: Sequence[str], processor: Any, max_caption_tokens: int) -> list[list[int]]:
    """Target tokens of captions, as `processor.build_training_inputs` makes them: prefix, caption, end token."""
    if not captions:
        return []
    texts = [processor.target_prefix + " ".join(caption.split()) for caption in captions]
    tokens = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*ids[:max_caption_tokens], processor.tokenizer.eos_token_id] for ids in tokens]


def plan_epoch(
    clips: Sequence[Clip],
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    share_prompts: bool = False,
    group_by_length: bool = True,
) -> list[list[Row]]:
    """The steps of one epoch: every caption once, `batch_size` captions in a step (the last may have fewer).

    Args:
        clips: the training clips.
        lengths: for each clip, any measure of its prompt's length.
        share_prompts: keep the captions of a clip together, behind one prompt.
        group_by_length: put examples of similar length into a step; the order of the steps stays random.
    """
    rng = np.random.default_rng([seed, _ORDER, epoch])
    if share_prompts:
        rows = [Row(clip, tuple(rng.permutation(len(item.captions)).tolist())) for clip, item in enumerate(clips)]
    else:
        rows = [Row(clip, (caption,)) for clip, item in enumerate(clips) for caption in range(len(item.captions))]
    rows = [rows[position] for position in rng.permutation(len(rows))]
    if group_by_length:
        runs = _runs(rows, _BATCHES_PER_RUN * batch_size)
        rows = [row for run in runs for row in sorted(run, key=lambda row: _row_length(row, clips, lengths))]
    batches = _cut(rows, batch_size)
    if group_by_length:
        batches = [batches[position] for position in rng.permutation(len(batches))]
    return batches


def _row_length(row: Row, clips: Sequence[Clip], lengths: Sequence[int]) -> int:
    return lengths[row.clip] + sum(len(clips[row.clip].targets[caption]) for caption in row.captions)


def _runs(rows: list[Row], captions_per_run: int) -> list[list[Row]]:
    runs: list[list[Row]] = [[]]
    count = 0
    for row in rows:
        if count >= captions_per_run:
            runs.append([])
            count = 0
        runs[-1].append(row)
        count += len(row.captions)
    return runs


def _cut(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Batches of exactly `batch_size` captions; a row that does not fit is divided between two batches."""
    batches: list[list[Row]] = [[]]
    room = batch_size
    for row in rows:
        captions = row.captions
        while captions:
            if not room:
                batches.append([])
                room = batch_size
            part, captions = captions[:room], captions[room:]
            batches[-1].append(Row(row.clip, part))
            room -= len(part)
    return [batch for batch in batches if batch]


def split_batch(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """A batch divided among processes and passes: consecutive rows, about equally many captions in each part."""
    total = sum(len(row.captions) for row in rows)
    result: list[list[Row]] = [[] for _ in range(parts)]
    before = 0
    for row in rows:
        middle = before + len(row.captions) / 2
        result[min(parts - 1, int(middle * parts / total))].append(row)
        before += len(row.captions)
    return result


def plan_validation(clips: Sequence[Clip], lengths: Sequence[int], batch_size: int) -> list[list[Row]]:
    """Every caption once, the captions of a clip behind one prompt, similar lengths together; no randomness."""
    rows = [Row(clip, tuple(range(len(item.captions)))) for clip, item in enumerate(clips)]
    rows.sort(key=lambda row: (lengths[row.clip], row.clip))
    return _cut(rows, batch_size)


@dataclass
class Batch:
    """One pass through the decoder, as NumPy arrays; see `collate`.

    Args:
        input_ids, position_ids: int64 of shape `(rows, length)`.
        segments: int64 of shape `(rows, length)`: 0 for the prompt, 1, 2, ... for the captions, -1 for padding.
        hidden: fp16 of shape `(rows, positions, d)`, the audio; hidden audio is all zero. None for text alone.
        hidden_lengths: valid positions of each row.
        target_rows, target_columns: where each target token is predicted.
        targets: the target tokens.
        target_captions: number of the caption (within the batch) that each target belongs to; -1 in a prompt.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray
    hidden: np.ndarray | None
    hidden_lengths: np.ndarray | None
    target_rows: np.ndarray
    target_columns: np.ndarray
    targets: np.ndarray
    target_captions: np.ndarray


@dataclass
class BatchBuilder:
    """Makes batches of rows.

    Args:
        clips: the clips that rows refer to.
        features: their encoded audio; None for text alone.
        processor: builds the prompts and knows the padding token.
        neighbours: one table per datastore; epochs take turns. Empty for no retrieval.
        options: how prompts are made.
        prompt_targets: whether the tokens of the prompts are to be predicted, too.
    """

    clips: Sequence[Clip]
    features: FeatureStore | None
    processor: Any
    neighbours: Sequence[Neighbours] = ()
    options: PromptOptions = field(default_factory=lambda: PromptOptions(k=4))
    prompt_targets: bool = False

    def retrieved(self, row: Row, epoch: int) -> list[str]:
        """The captions of a row's prompt in one epoch."""
        if not self.neighbours or not self.options.k:
            return []
        options = self.options
        if options.prompt_dropout and self._rng(row, epoch, 2).random() < options.prompt_dropout:
            return []
        table = self.neighbours[epoch % len(self.neighbours)]
        nearest = table.of(row.clip)
        chosen = nearest[: options.k]
        if options.draw_from or options.shuffle:
            rng = self._rng(row, epoch)
            if options.draw_from:
                pool = nearest[: options.draw_from]
                chosen = pool[np.sort(rng.choice(len(pool), size=min(options.k, len(pool)), replace=False))]
            if options.shuffle:
                chosen = rng.permutation(chosen)
        return [table.captions[number] for number in chosen]

    def audio_is_hidden(self, row: Row, epoch: int) -> bool:
        """Whether a row's audio is hidden in one epoch."""
        if not self.options.audio_dropout:
            return False
        # The last number keeps this draw apart from the prompt's.
        return bool(self._rng(row, epoch, 1).random() < self.options.audio_dropout)

    def _rng(self, row: Row, epoch: int, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.options.seed, _DRAW, epoch, row.clip, row.captions[0], stream])

    def prompt_lengths(self, clips: Sequence[int] | None = None) -> list[int]:
        """Tokens of the prompts of the k nearest captions: what the grouping by length sorts by."""
        clips = range(len(self.clips)) if clips is None else clips
        if not self.neighbours or not self.options.k:
            return [0] * len(clips)
        table = self.neighbours[0]
        chosen = [table.of(clip)[: self.options.k] for clip in clips]
        needed = sorted({int(number) for rows in chosen for number in rows})
        if not needed:
            return [0] * len(clips)
        tokens = self.processor.tokenizer([table.captions[number] for number in needed], add_special_tokens=False)
        length = {number: len(ids) for number, ids in zip(needed, tokens["input_ids"], strict=True)}
        return [sum(length[int(number)] for number in rows) for rows in chosen]

    def build(self, rows: Sequence[Row], epoch: int = 0) -> Batch:
        """The batch of some rows."""
        prompts = self.processor.build_prompts(retrieved=[self.retrieved(row, epoch) for row in rows])
        ids, mask = prompts["decoder_input_ids"].numpy(), prompts["decoder_attention_mask"].numpy().astype(bool)
        tokens = [ids[number][mask[number]] for number in range(len(rows))]
        targets = [[self.clips[row.clip].targets[caption] for caption in row.captions] for row in rows]
        pad = self.processor.tokenizer.pad_token_id
        if self.features is None:
            return collate(tokens, targets, None, (), pad, prompt_targets=self.prompt_targets)
        states = [self.features.hidden_states(self.clips[row.clip].key) for row in rows]
        hidden_flags = [self.audio_is_hidden(row, epoch) for row in rows]
        return collate(tokens, targets, states, hidden_flags, pad, prompt_targets=self.prompt_targets)


def collate(
    prompts: Sequence[np.ndarray],
    targets: Sequence[Sequence[Sequence[int]]],
    states: Sequence[np.ndarray] | None,
    hide: Sequence[bool],
    pad_token_id: int,
    *,
    prompt_targets: bool = False,
) -> Batch:
    """Rows of `[prompt][caption][caption]...`, padded on the right.

    Every caption continues the prompt: its positions start behind the prompt's, and its segment sees the prompt's and
    itself alone. The last token of the prompt predicts the first of each caption; the end token is only predicted.

    Args:
        prompts: token ids of each row's prompt.
        targets: for each row, the target tokens of its captions, end token last.
        states: for each row, hidden states of shape `(positions, d)`; None for text alone.
        hide: for each row, whether its audio is hidden.
        prompt_targets: let the tokens of the prompts (but the first) be targets, too.
    """
    length = max(len(p) + sum(len(t) - 1 for t in group) for p, group in zip(prompts, targets, strict=True))
    shape = (len(prompts), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, -1, dtype=np.int64)
    where: list[tuple[int, int, int, int]] = []
    number = 0
    for row, (prompt, group) in enumerate(zip(prompts, targets, strict=True)):
        start = len(prompt)
        input_ids[row, :start] = prompt
        position_ids[row, :start] = np.arange(start)
        segments[row, :start] = 0
        if prompt_targets:
            where += [(row, column, int(token), -1) for column, token in enumerate(prompt[1:])]
        end = start
        for segment, target in enumerate(group, start=1):
            inside = slice(end, end + len(target) - 1)
            input_ids[row, inside] = target[:-1]
            position_ids[row, inside] = np.arange(start, start + len(target) - 1)
            segments[row, inside] = segment
            columns = [start - 1, *range(end, end + len(target) - 1)]
            where += [(row, column, token, number) for column, token in zip(columns, target, strict=True)]
            end += len(target) - 1
            number += 1
    hidden = lengths = None
    if states is not None:
        lengths = np.array([len(block) for block in states], dtype=np.int64)
        hidden = np.zeros((len(states), int(lengths.max()), states[0].shape[1]), dtype=np.float16)
        for row, block in enumerate(states):
            if not hide[row]:
                hidden[row, : len(block)] = block
    rows, columns, tokens, numbers = (np.array(column, dtype=np.int64) for column in zip(*where, strict=True))
    return Batch(input_ids, position_ids, segments, hidden, lengths, rows, columns, tokens, numbers)
