"""Decode steps in tensors that neither grow nor move, so that a GPU can record them once and replay them.

A decode step of GPT-2 small starts some 300 kernels, each shorter than it takes Python to start it: a GPU waits. A
CUDA graph starts all of them at once, but reads and writes the addresses that it has recorded. [`FixedSteps`]
therefore has room for the longest caption from the beginning, says with numbers in tensors which places are new, and
copies the next batch of the same shape into the room of the last. Finished clips stay in the batch until all have
finished.

Nothing here needs a GPU: elsewhere the same steps run without being recorded, which is slower than growing caches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from .decoding_recap import SharedPromptCache, decode_token

# Prompts and captions are given room in multiples of this: few shapes, and strides that attention kernels like.
_ROOM = 16
# Shapes of batches whose room and recordings are kept: a stream of equal batches has one, its last batch another.
_SHAPES_KEPT = 2
# Runs before a recording: the first ones choose kernels and ask for memory.
_WARM_UPS = 3

Step = Callable[[], torch.Tensor]


def record_cuda_graph(step: Step) -> Step:
    """Records `step`, which reads and writes the same tensors at each call, as a CUDA graph.

    Args:
        step (`Callable`): may be run several times in a row without another result.

    Returns:
        `Callable`: replays the recording and returns the tensor that `step` returned, with its new numbers.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def run_directly(step: Step) -> Step:
    """Records nothing: what a device without graphs does."""
    return step


class FixedSteps:
    """What a [`SharedPromptCache`] is to `decode_token`, in tensors that stay where they are.

    Args:
        decoder (`GPT2LMHeadModel`): whose steps these are.
        cache ([`SharedPromptCache`]): filled with the prompts of a batch; its shapes are the shapes.
        max_new_tokens (`int`): of a caption.
        record (`Callable`, *optional*): [`record_cuda_graph`] on CUDA devices, else [`run_directly`].
    """

    def __init__(
        self,
        decoder: Any,
        cache: SharedPromptCache,
        max_new_tokens: int,
        record: Callable[[Step], Step] | None = None,
    ) -> None:
        device = cache.bias.device
        self.decoder = decoder
        self.record = record or (record_cuda_graph if device.type == "cuda" else run_directly)
        self.num_clips, self.group_size = cache.num_clips, cache.group_size
        self.prompt_room = _rounded(cache.prompt_length)
        room = self.prompt_room + self.group_size * _rounded(max_new_tokens)
        self.keys, self.values = (
            [part.new_zeros(*part.shape[:2], room, part.shape[3]) for part in parts]
            for parts in (cache.keys, cache.values)
        )
        self.bias = cache.bias.new_zeros(self.num_clips, 1, self.group_size, room)
        self.encoder = [(keys.clone(), values.clone()) for keys, values in cache.encoder]
        self.encoder_bias = None if cache.encoder_bias is None else cache.encoder_bias.clone()
        rows = self.num_clips * self.group_size
        self.tokens, self.positions = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.places = torch.zeros(self.group_size, dtype=torch.long, device=device)
        self._beams = torch.arange(self.group_size, device=device)
        # What the beams of a clip see of each other's new token: only their own.
        own = torch.full((self.group_size, self.group_size), torch.finfo(self.bias.dtype).min, device=device)
        self._own = own.fill_diagonal_(0.0).to(self.bias.dtype)
        self.num_generated = self.num_seen = 0
        self._recorded: dict[int, Step] = {}

    def load(self, cache: SharedPromptCache) -> None:
        """Begins another batch of the same shape.

        Args:
            cache ([`SharedPromptCache`]): filled with its prompts.
        """
        prompt = slice(0, cache.prompt_length)
        for mine, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for room, part in zip(mine, theirs, strict=True):
                room[:, :, prompt].copy_(part[:, :, prompt])
        for mine, theirs in zip(self.encoder, cache.encoder, strict=True):
            for room, part in zip(mine, theirs, strict=True):
                room.copy_(part)
        if self.encoder_bias is not None:
            self.encoder_bias.copy_(cache.encoder_bias)
        self.bias.fill_(torch.finfo(self.bias.dtype).min)
        self.bias[..., prompt].copy_(cache.bias[..., prompt])
        self.num_generated = 0

    def reorder_beams(self, beams: torch.LongTensor) -> None:
        """`(num_clips, group_size)`: for each beam the number of the beam that it goes on from."""
        self.bias.copy_(self.bias.take_along_dim(beams[:, None, :, None], dim=2))

    def open_token(self) -> torch.LongTensor:
        """The places of the new token, which each beam's own attention now sees. Twice in a row it changes nothing."""
        self.bias.index_copy_(3, self.places, self._own.expand(self.num_clips, 1, -1, -1))
        return self.places

    def __call__(self, tokens: torch.LongTensor, positions: torch.LongTensor) -> torch.Tensor:
        """One token of each beam, `(rows,)` -> logits `(rows, vocab_size)`, good until the next call."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        torch.add(self._beams, self.prompt_room + self.num_generated * self.group_size, out=self.places)
        self.num_generated += 1
        # As far as the caption has come, in few sizes: each is a recording.
        self.num_seen = self.prompt_room + self.group_size * _rounded(self.num_generated)
        if self.num_seen not in self._recorded:
            self._recorded[self.num_seen] = self.record(self._step)
        return self._recorded[self.num_seen]()

    def _step(self) -> torch.Tensor:
        return decode_token(self.decoder, self, self.tokens, self.positions)


class FixedDecoding:
    """Keeps the [`FixedSteps`] of the last shapes of batches.

    Args:
        record (`Callable`, *optional*): see [`FixedSteps`].
    """

    def __init__(self, record: Callable[[Step], Step] | None = None) -> None:
        self.record = record
        self._kept: OrderedDict[tuple[Any, ...], FixedSteps] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedDecoding:
        # Recordings know the addresses of one model's weights.
        return FixedDecoding(self.record)

    def begin(self, decoder: Any, cache: SharedPromptCache, max_new_tokens: int) -> FixedSteps:
        """The steps of a batch whose prompts are in `cache`."""
        encoder = cache.encoder[0][0]
        shape = (
            cache.num_clips,
            cache.group_size,
            _rounded(cache.prompt_length),
            _rounded(max_new_tokens),
            encoder.shape[2],
            cache.encoder_bias is None,
            encoder.dtype,
            encoder.device,
        )
        if shape not in self._kept:
            while len(self._kept) >= _SHAPES_KEPT:
                self._kept.popitem(last=False)
            self._kept[shape] = FixedSteps(decoder, cache, max_new_tokens, self.record)
        self._kept.move_to_end(shape)
        self._kept[shape].load(cache)
        return self._kept[shape]


def _rounded(length: int) -> int:
    return -(-length // _ROOM) * _ROOM


__all__ = ["FixedDecoding", "FixedSteps", "record_cuda_graph", "run_directly"]
