"""How much each place of the audio and each retrieved caption had to do with each token: four measures.

`attention` reads the attention maps. Which vectors a layer mixes says little about what the answer rests on, and on
our own model it is at chance. `gradient` weighs every attention weight with its effect on the token's log-probability
(gradient x attention; Barkan et al., "Grad-SAM", CIKM 2021; Chefer et al., ICCV 2021). `occlusion` hides a place and
measures what the token loses, `insertion` hides everything else and measures what is left: both ask the model itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .generation_recap import RecapEncoderOutput, position_ids_of

METHODS = ("gradient", "insertion", "occlusion", "attention")
# Rows of one forward pass where places are hidden one by one.
_ROWS = 32
# Cells before and behind the one that is hidden or heard: the encoder spreads a sound over its neighbours.
_MARGIN = 1
_SWITCHING = threading.RLock()


@dataclass(frozen=True)
class Passage:
    """A prompt with its answer, and where the things in it are.

    Args:
        states (`torch.Tensor` of shape `(1, n, d)`): encoder states of one recording.
        ids (`torch.LongTensor` of shape `(1, length)`): prompt and answer.
        start (`int`): tokens of the prompt.
        captions (sequence of slices): the tokens of each retrieved caption in the prompt.
        grid (`tuple`): (W, F, T), whose product is n.
    """

    states: torch.Tensor
    ids: torch.Tensor
    start: int
    captions: Sequence[slice]
    grid: tuple[int, int, int]

    @property
    def targets(self) -> torch.Tensor:
        """Tokens of the answer, `(tokens,)`."""
        return self.ids[0, self.start :]

    def rows_of(self, token: int) -> slice:
        """The position from which a token of the answer is predicted: the one before it."""
        return slice(self.start - 1 + token, self.start + token)


@dataclass(frozen=True)
class Attribution:
    """What one measure gave.

    Args:
        log_probs (`torch.Tensor` of shape `(tokens,)`): of the answer's tokens, nothing hidden.
        audio (`torch.Tensor` of shape `(groups, W, F, T)`): non-negative weights of each group of tokens.
        captions (`torch.Tensor` of shape `(groups, k)`): the same of the retrieved captions.
    """

    log_probs: torch.Tensor
    audio: torch.Tensor
    captions: torch.Tensor


@contextlib.contextmanager
def eager_attention(decoder: Any) -> Iterator[None]:
    """Eager attention in `decoder` for a while: no other implementation shows its weights."""
    with _SWITCHING:
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager")
        try:
            yield
        finally:
            decoder.set_attn_implementation(before)


def attribute(model: Any, passage: Passage, groups: Sequence[Sequence[int]], method: str) -> Attribution:
    """Weights of the audio's cells and of the retrieved captions for groups of tokens (the words, say).

    Args:
        model ([`RecapForConditionalGeneration`]): in evaluation mode.
        passage ([`Passage`]): what is explained.
        groups: for each group the indices of its tokens in the answer.
        method (`str`): one of [`METHODS`].

    Raises:
        `ValueError`: on another method.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    if method == "attention":
        return _from_attention(model, passage, groups)
    if method == "gradient":
        return _from_gradient(model, passage, groups)
    return _from_hiding(model, passage, groups, insertion=method == "insertion")


def token_log_probs(
    model: Any,
    passage: Passage,
    states: torch.Tensor | None = None,
    heard: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, `(rows, tokens)`, with things hidden.

    Args:
        states (`torch.Tensor` of shape `(1, n, d)`, *optional*): instead of the passage's.
        heard (`torch.Tensor` of shape `(rows, n)`, *optional*): 0 for encoder states that are hidden.
        read (`torch.Tensor` of shape `(rows, length)`, *optional*): 0 for tokens that are hidden. What is not hidden
            keeps its position.
    """
    states = passage.states if states is None else states
    rows = max(len(mask) for mask in (heard, read, states) if mask is not None)
    parts = []
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        chosen = slice(first, first + count)
        ids = passage.ids.expand(count, -1)
        mask = torch.ones_like(ids) if read is None else read[chosen].to(ids)
        encoding = RecapEncoderOutput(
            last_hidden_state=states.expand(count, -1, -1),
            attention_mask=None if heard is None else heard[chosen].to(ids),
        )
        output = model(
            encoder_outputs=encoding,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            decoder_position_ids=position_ids_of(torch.ones_like(ids)),
            use_cache=False,
            logits_to_keep=len(passage.targets) + 1,
        )
        parts.append(_of_tokens(output.logits[:, :-1], passage.targets))
    return torch.cat(parts)


def _of_tokens(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) -> log-probabilities (rows, tokens), in float32 at least."""
    log_probs = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_probs.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]


def _attention_pass(model: Any, passage: Passage) -> tuple[torch.Tensor, tuple, tuple]:
    """Log-probabilities `(tokens,)`, cross-attention and self-attention weights, one (1, H, length, keys) a layer."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(passage.ids)
    output = model(
        encoder_outputs=RecapEncoderOutput(last_hidden_state=passage.states),
        # A leaf that asks for gradients, so that the maps of a frozen model have some.
        decoder_inputs_embeds=embeddings.requires_grad_(torch.is_grad_enabled()),
        decoder_attention_mask=torch.ones_like(passage.ids),
        output_attentions=True,
        use_cache=False,
    )
    log_probs = _of_tokens(output.logits[:, passage.start - 1 : -1], passage.targets)[0]
    return log_probs, output.cross_attentions, output.decoder_attentions


def _from_attention(model: Any, passage: Passage, groups: Sequence[Sequence[int]]) -> Attribution:
    with torch.no_grad(), eager_attention(model.decoder):
        log_probs, cross, own = _attention_pass(model, passage)
    cross_mean = torch.stack([weights[0].float().mean(dim=0) for weights in cross]).mean(dim=0)
    own_mean = torch.stack([weights[0].float().mean(dim=0) for weights in own]).mean(dim=0)
    audio, captions = [], []
    for group in groups:
        rows = [passage.rows_of(token).start for token in group]
        audio.append(cross_mean[rows].mean(dim=0))
        per_key = own_mean[rows].mean(dim=0)
        captions.append(_per_caption(per_key, passage))
    return _attribution(log_probs, audio, captions, passage)


def _from_gradient(model: Any, passage: Passage, groups: Sequence[Sequence[int]]) -> Attribution:
    audio, captions = [], []
    with torch.enable_grad(), eager_attention(model.decoder):
        log_probs, cross, own = _attention_pass(model, passage)
        for group in groups:
            gradients = torch.autograd.grad(log_probs[list(group)].sum(), (*cross, *own), retain_graph=True)
            weighed = [
                (gradient * weights).detach()[0].sum(dim=0, dtype=log_probs.dtype)
                for gradient, weights in zip(gradients, (*cross, *own), strict=True)
            ]
            audio.append(torch.stack(weighed[: len(cross)]).sum(dim=(0, 1)).clamp(min=0))
            # What the prompt's end and the answer take from the captions; not what these take from each other.
            behind = max((place.stop for place in passage.captions), default=0)
            per_key = torch.stack(weighed[len(cross) :])[:, behind:].sum(dim=(0, 1))
            captions.append(_per_caption(per_key, passage).clamp(min=0))
    return _attribution(log_probs.detach(), audio, captions, passage)


@torch.no_grad()
def _from_hiding(model: Any, passage: Passage, groups: Sequence[Sequence[int]], insertion: bool) -> Attribution:
    full = token_log_probs(model, passage)[0]
    chosen = _neighbourhoods(passage.grid).to(passage.states.device)
    by_place = token_log_probs(model, passage, heard=chosen if insertion else 1 - chosen)
    by_caption = token_log_probs(model, passage, read=_shown(passage, insertion))
    audio, captions = [], []
    for group in groups:
        tokens = list(group)
        here, alone = by_place[:, tokens].sum(dim=1), by_caption[:, tokens].sum(dim=1)
        if insertion:
            audio.append((here - here.mean()).clamp(min=0))
            captions.append((alone[:-1] - alone[-1]).clamp(min=0))
        else:
            audio.append((full[tokens].sum() - here).clamp(min=0))
            captions.append((full[tokens].sum() - alone[:-1]).clamp(min=0))
    return _attribution(full, audio, captions, passage)


def _shown(passage: Passage, insertion: bool) -> torch.Tensor:
    """(k + 1, length): for each caption it alone shown (or all but it), and in the last row none of them."""
    shown = torch.ones(len(passage.captions) + 1, passage.ids.shape[1], device=passage.ids.device)
    for row in range(len(shown)):
        for other, place in enumerate(passage.captions):
            shown[row, place] = float(row < len(passage.captions) and (other == row) == insertion)
    return shown


def _neighbourhoods(grid: tuple[int, int, int]) -> torch.Tensor:
    """(n, n) of 0 and 1: for each cell itself and its neighbours in time, within its window and its band."""
    windows, bands, cells = grid
    near = (torch.arange(cells)[:, None] - torch.arange(cells)).abs() <= _MARGIN
    return torch.block_diag(*[near.float()] * (windows * bands))


def _per_caption(per_key: torch.Tensor, passage: Passage) -> torch.Tensor:
    sums = [per_key[place].sum() for place in passage.captions]
    return torch.stack(sums) if sums else per_key.new_zeros(0)


def _attribution(
    log_probs: torch.Tensor, audio: list[torch.Tensor], captions: list[torch.Tensor], passage: Passage
) -> Attribution:
    if not audio:
        return Attribution(
            log_probs, log_probs.new_zeros(0, *passage.grid), log_probs.new_zeros(0, len(passage.captions))
        )
    return Attribution(log_probs, torch.stack(audio).view(-1, *passage.grid), torch.stack(captions))


def hidden_log_probs(model: Any, passage: Passage) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answer's tokens without the audio, and without the retrieved captions.

    The audio is hidden by states of zeros, as in the control "audio hidden" of the evaluation.
    """
    with torch.no_grad():
        deaf = token_log_probs(model, replace(passage, states=torch.zeros_like(passage.states)))[0]
        read = torch.ones_like(passage.ids)
        for place in passage.captions:
            read[:, place] = 0
        blind = token_log_probs(model, passage, read=read)[0]
    return deaf, blind


__all__ = ["METHODS", "Attribution", "Passage", "attribute", "eager_attention", "hidden_log_probs", "token_log_probs"]
