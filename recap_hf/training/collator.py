"""Examples of captions behind retrieval prompts, and the collator that makes batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from recap_hf.modeling.generation_recap import states_mask

from .data import Clip
from .features import FeatureStore
from .neighbours import Neighbours
from .plans import DRAW, Row
from .task import Key


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are made from the nearest captions.

    Args:
        k: captions in a prompt.
        draw_from: draw them from this number of nearest captions; 0 takes the k nearest.
        shuffle: random order instead of most similar first.
        vary_k: draw the number of captions, too, from 1 to k.
        audio_dropout: share of rows whose audio is hidden.
        prompt_dropout: share of rows that get no captions in their prompt.
        seed: of the draws.
        embedding_noise: see `with_noise`; of embeddings, drawn anew for each row and epoch.
    """

    k: int
    draw_from: int = 0
    shuffle: bool = False
    vary_k: bool = False
    audio_dropout: float = 0.0
    prompt_dropout: float = 0.0
    seed: int = 0
    embedding_noise: float = 0.0


def with_targets(clips: Sequence[Clip], processor: Any, max_caption_tokens: int) -> list[Clip]:
    """The clips with target tokens of their captions: the processor's prefix, the caption, the end token.

    The same as those of `processor.build_training_inputs`, and tokenized all at once.
    """
    texts = [processor.target_prefix + " ".join(caption.split()) for clip in clips for caption in clip.captions]
    tokens = iter(processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    end = processor.tokenizer.eos_token_id
    cut = slice(max_caption_tokens)
    return [replace(clip, targets=[[*next(tokens)[cut], end] for _ in clip.captions]) for clip in clips]


def with_noise(embeds: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """Embeddings `(n, P)` with Gaussian noise; their lengths stay.

    Args:
        embeds: of any length; `width` is that of the noise in each dimension on an embedding of length 1.
        width: standard deviation.
        rng: draws it.
    """
    lengths = np.linalg.norm(embeds.astype(np.float32), axis=-1, keepdims=True)
    noised = embeds + width * lengths * rng.standard_normal(embeds.shape, dtype=np.float32)
    noised *= lengths / np.maximum(np.linalg.norm(noised, axis=-1, keepdims=True), 1e-12)
    return noised.astype(embeds.dtype)


@dataclass
class Example:
    """One row of a batch.

    Args:
        prompt: token ids of the prompt.
        targets: target tokens of each caption behind it, end token last.
        states: hidden states of the audio, fp16 of shape `(positions, d)`; None for text alone.
        weight: of its loss.
    """

    prompt: np.ndarray
    targets: list[list[int]]
    states: np.ndarray | None = None
    weight: float = 1.0


@dataclass(eq=False)
class PromptedCaptions(Dataset):
    """Captions behind retrieval prompts, indexed by `Key` of a `Row`.

    Args:
        clips: the clips that rows refer to.
        features: their encoded audio; None for text alone.
        processor: builds the prompts.
        neighbours: one table per datastore, used in turn epoch by epoch. Empty for no retrieval.
        options: how prompts are made.
    """

    clips: Sequence[Clip]
    features: FeatureStore | None
    processor: Any
    neighbours: Sequence[Neighbours]
    options: PromptOptions

    def __getitem__(self, key: Key) -> Example:
        row, clip = key.example, self.clips[key.example.clip]
        prompt = self.processor.build_prompts(retrieved=[self.retrieved(row, key.epoch)])["decoder_input_ids"][0]
        states = None
        if self.features is not None:
            states = np.concatenate(self.features.read(clip.key, "states"))
            if self.options.embedding_noise:
                states = with_noise(states, self.options.embedding_noise, self._rng(row, key.epoch, 4))
            states = np.zeros_like(states) if self.audio_is_hidden(row, key.epoch) else states
        return Example(prompt.numpy(), [clip.targets[caption] for caption in row.captions], states, key.weight)

    def without_captions(self) -> "PromptedCaptions":
        """The same clips, with prompts that hold no captions."""
        return PromptedCaptions(self.clips, self.features, self.processor, (), replace(self.options, k=0))

    def retrieved(self, row: Row, epoch: int) -> list[str]:
        """The captions of a row's prompt in one epoch."""
        options = self.options
        if not self.neighbours or not options.k or self._rng(row, epoch, 2).random() < options.prompt_dropout:
            return []
        table = self.neighbours[epoch % len(self.neighbours)]
        k = int(self._rng(row, epoch, 3).integers(options.k)) + 1 if options.vary_k else options.k
        pool, rng = table.of(row.clip)[: options.draw_from or k], self._rng(row, epoch)
        chosen = pool[np.sort(rng.choice(len(pool), size=min(k, len(pool)), replace=False))]
        if options.shuffle:
            chosen = rng.permutation(chosen)
        return [table.captions[number] for number in chosen]

    def audio_is_hidden(self, row: Row, epoch: int) -> bool:
        """Whether a row's audio is hidden in one epoch."""
        return self._rng(row, epoch, 1).random() < self.options.audio_dropout

    def _rng(self, row: Row, epoch: int, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.options.seed, DRAW, epoch, row.clip, row.captions[0], stream])

    def prompt_lengths(self) -> list[int]:
        """For each clip, the tokens of its k nearest captions: grouping by length sorts by them."""
        if not self.neighbours:
            return [0] * len(self.clips)
        table, k = self.neighbours[0], self.options.k
        nearest = [table.of(clip)[:k].tolist() for clip in range(len(self.clips))]
        used = sorted({row for rows in nearest for row in rows})
        texts = [table.captions[row] for row in used]
        tokens = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        lengths = dict(zip(used, map(len, tokens), strict=True))
        return [sum(lengths[row] for row in rows) for rows in nearest]


@dataclass
class Batch:
    """One pass through the decoder, as tensors.

    Args:
        input_ids, position_ids: int64 of shape `(rows, length)`.
        segments: int64 of shape `(rows, length)`: 0 for the prompt, 1, 2, ... for the captions, -1 for padding.
        target_rows, target_columns: int64 of shape `(tokens,)`: the place that predicts each target token.
        targets: int64 of shape `(tokens,)`: the target tokens.
        weights: float32 of shape `(tokens,)`: of each target's loss.
        hidden: fp16 of shape `(rows, positions, d)`, the audio; hidden audio is all zero. None for text alone.
        hidden_mask: int64 of shape `(rows, positions)`, or None if no position is masked.
        shared: whether a prompt has several captions.
        padded: whether rows differ in length.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    target_rows: torch.Tensor
    target_columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    hidden: torch.Tensor | None
    hidden_mask: torch.Tensor | None
    shared: bool
    padded: bool

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """The batch on `device`, hidden states in `dtype`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        hidden = {} if self.hidden is None else {"hidden": moved["hidden"].to(dtype)}
        return replace(self, **moved | hidden)


@dataclass(frozen=True)
class CaptionCollator:
    """Rows of `[prompt][caption][caption]...`, padded on the right.

    Every caption continues the prompt: its positions start behind the prompt's, and its segment attends to the prompt
    and itself alone. The last token of the prompt predicts the first of each caption; the end token is only predicted.

    Args:
        pad_token_id: fills the rows.
        prompt_weight: weight of the loss of a prompt's tokens (all but the first are targets), where a caption's
            have 1; 0: prompts are not targets.
    """

    pad_token_id: int
    prompt_weight: float = 0.0

    def __call__(self, examples: Sequence[Example]) -> Batch:
        length = max(len(item.prompt) + sum(len(target) - 1 for target in item.targets) for item in examples)
        shape = (len(examples), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int64)
        places: list[tuple[int, int, int, float]] = []
        for row, item in enumerate(examples):
            start = end = len(item.prompt)
            input_ids[row, :start] = item.prompt
            position_ids[row, :start] = np.arange(start)
            segments[row, :start] = 0
            if self.prompt_weight:
                weight = item.weight * self.prompt_weight
                places += [(row, column, int(token), weight) for column, token in enumerate(item.prompt[1:])]
            for segment, target in enumerate(item.targets, start=1):
                inside = slice(end, end + len(target) - 1)
                input_ids[row, inside] = target[:-1]
                position_ids[row, inside] = np.arange(start, start + len(target) - 1)
                segments[row, inside] = segment
                columns = (start - 1, *range(inside.start, inside.stop))
                places += [(row, column, token, item.weight) for column, token in zip(columns, target, strict=True)]
                end = inside.stop
        rows, columns, tokens, weights = zip(*places, strict=True)
        return Batch(
            *map(torch.from_numpy, (input_ids, position_ids, segments)),
            *map(torch.tensor, (rows, columns, tokens)),
            torch.tensor(weights, dtype=torch.float32),
            *self._audio(examples),
            shared=bool(segments.max() > 1),
            padded=bool(segments.min() < 0),
        )

    @staticmethod
    def _audio(examples: Sequence[Example]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if examples[0].states is None:
            return None, None
        length = max(len(item.states) for item in examples)
        hidden = np.zeros((len(examples), length, examples[0].states.shape[1]), dtype=np.float16)
        for row, item in enumerate(examples):
            hidden[row, : len(item.states)] = item.states
        states = torch.from_numpy(hidden)
        mask = states_mask(states)
        return states, None if mask.all() else mask
