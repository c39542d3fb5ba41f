"""How much each token of a caption depends on each region of the audio and each retrieved caption: two methods.

`gradient` multiplies every attention weight with its gradient on the token's log-probability (gradient x attention;
Barkan et al., "Grad-SAM", CIKM 2021; Chefer et al., ICCV 2021). `insertion` hides all but one region and measures what
remains of the log-probability.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from recap_hf.modeling.generation_recap import RecapEncoderOutput, position_ids_of, states_mask

METHODS = ("gradient", "insertion")
# Rows of one forward pass when regions are hidden one by one.
_ROWS = 32
# A region is a cell and this number of cells on either side: the encoder spreads a sound over adjacent cells.
_MARGIN = 1
_SWITCHING = threading.RLock()


@dataclass(frozen=True)
class Passage:
    """A prompt with its answer, and the positions of their parts.

    Args:
        states (`torch.Tensor` of shape `(1, n, d)`): encoder states of one recording. Those of padding are all zero:
            the decoder does not attend to them, and their cells have no weight.
        ids (`torch.LongTensor` of shape `(1, length)`): prompt and answer.
        start (`int`): number of tokens of the prompt.
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

    @property
    def state_mask(self) -> torch.Tensor:
        """1 for the states that the decoder attends to, `(1, n)`, as in captioning."""
        return states_mask(self.states)


@dataclass(frozen=True)
class Attribution:
    """The result of one method.

    Args:
        log_probs (`torch.Tensor` of shape `(tokens,)`): of the answer's tokens, with nothing hidden.
        audio (`torch.Tensor` of shape `(groups, W, F, T)`): non-negative weights of the cells per group of tokens.
        captions (`torch.Tensor` of shape `(groups, k)`): the same for the retrieved captions.
    """

    log_probs: torch.Tensor
    audio: torch.Tensor
    captions: torch.Tensor


@contextlib.contextmanager
def eager_attention(decoder: Any) -> Iterator[None]:
    """Switches `decoder` to eager attention: the other implementations do not return attention weights."""
    with _SWITCHING:
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager")
        try:
            yield
        finally:
            decoder.set_attn_implementation(before)


def attribute(model: Any, passage: Passage, groups: Sequence[Sequence[int]], method: str) -> Attribution:
    """Weights of the audio's cells and of the retrieved captions for groups of tokens, such as words.

    Args:
        model ([`RecapForConditionalGeneration`]): in evaluation mode.
        passage ([`Passage`]): prompt and answer.
        groups: for each group the indices of its tokens in the answer.
        method (`str`): one of [`METHODS`].
    """
    groups = [list(group) for group in groups]
    weigh = _from_gradient if method == "gradient" else _from_insertion
    log_probs, audio, captions = weigh(model, passage, groups)
    # Without groups, as for a caption without words, there is nothing to stack.
    audio = torch.stack(audio) if audio else log_probs.new_zeros(0, passage.states.shape[1])
    captions = torch.stack(captions) if captions else log_probs.new_zeros(0, len(passage.captions))
    return Attribution(log_probs, audio.view(-1, *passage.grid), captions)


# Log-probabilities, and a list with one tensor per group for the audio and for the captions.
_Weights = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


def token_log_probs(
    model: Any,
    passage: Passage,
    states: torch.Tensor | None = None,
    state_mask: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, `(rows, tokens)`, with parts hidden.

    Args:
        states (`torch.Tensor` of shape `(1, n, d)`, *optional*): instead of the passage's.
        state_mask (`torch.Tensor` of shape `(rows, n)`, *optional*): 0 for hidden encoder states. Where all are, they
            are zeros, as where the audio is hidden.
        token_mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 0 for hidden tokens. The others keep their
            positions.
    """
    states = passage.states if states is None else states
    rows = max(len(mask) for mask in (state_mask, token_mask, states) if mask is not None)
    parts = []
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        chosen = slice(first, first + count)
        ids, kept = passage.ids.expand(count, -1), states.expand(count, -1, -1)
        if state_mask is not None:
            kept = kept * state_mask[chosen, :, None].to(kept)
        encoding = RecapEncoderOutput(last_hidden_state=kept, attention_mask=states_mask(kept))
        output = model(
            encoder_outputs=encoding,
            decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids) if token_mask is None else token_mask[chosen].to(ids),
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
        encoder_outputs=RecapEncoderOutput(last_hidden_state=passage.states, attention_mask=passage.state_mask),
        # A leaf that requires gradients, so that the maps of a frozen model have them, too.
        decoder_inputs_embeds=embeddings.requires_grad_(torch.is_grad_enabled()),
        decoder_attention_mask=torch.ones_like(passage.ids),
        output_attentions=True,
        use_cache=False,
    )
    log_probs = _of_tokens(output.logits[:, passage.start - 1 : -1], passage.targets)[0]
    return log_probs, output.cross_attentions, output.decoder_attentions


def _from_gradient(model: Any, passage: Passage, groups: list[list[int]]) -> _Weights:
    audio, captions = [], []
    # Attention from the rest of the prompt and the answer to the captions, not from the captions to each other.
    behind = max((place.stop for place in passage.captions), default=0)
    with torch.enable_grad(), eager_attention(model.decoder):
        log_probs, cross, own = _attention_pass(model, passage)
        for group in groups:
            gradients = torch.autograd.grad(log_probs[group].sum(), (*cross, *own), retain_graph=True)
            weighted = [
                (gradient * weights).detach()[0].sum(dim=0, dtype=log_probs.dtype)
                for gradient, weights in zip(gradients, (*cross, *own), strict=True)
            ]
            audio.append(torch.stack(weighted[: len(cross)]).sum(dim=(0, 1)).clamp(min=0))
            per_key = torch.stack(weighted[len(cross) :])[:, behind:].sum(dim=(0, 1))
            sums = [per_key[place].sum() for place in passage.captions]
            captions.append((torch.stack(sums) if sums else per_key.new_zeros(0)).clamp(min=0))
    return log_probs.detach(), audio, captions


@torch.no_grad()
def _from_insertion(model: Any, passage: Passage, groups: list[list[int]]) -> _Weights:
    attended = passage.state_mask[0].bool()
    regions = _regions(passage.grid).to(passage.states.device)[attended]
    by_region = token_log_probs(model, passage, state_mask=regions)
    by_caption = token_log_probs(model, passage, token_mask=_caption_masks(passage))
    audio, captions = [], []
    for group in groups:
        region, caption = by_region[:, group].sum(dim=1), by_caption[:, group].sum(dim=1)
        gain = (region - region.mean()).clamp(min=0)
        audio.append(gain.new_zeros(len(attended)).masked_scatter(attended, gain))
        captions.append((caption[:-1] - caption[-1]).clamp(min=0))
    return token_log_probs(model, passage)[0], audio, captions


def _caption_masks(passage: Passage) -> torch.Tensor:
    """(k + 1, length): a row per caption with it alone visible, and a last row without captions."""
    masks = torch.ones(len(passage.captions) + 1, passage.ids.shape[1], device=passage.ids.device)
    for row in range(len(masks)):
        for other, place in enumerate(passage.captions):
            masks[row, place] = float(other == row)
    return masks


def _regions(grid: tuple[int, int, int]) -> torch.Tensor:
    """(n, n) of 0 and 1: for each cell itself and the adjacent ones in time, within its window and its band."""
    windows, bands, cells = grid
    near = (torch.arange(cells)[:, None] - torch.arange(cells)).abs() <= _MARGIN
    return torch.block_diag(*[near.float()] * (windows * bands))


@torch.no_grad()
def hidden_log_probs(model: Any, passage: Passage) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answer's tokens without the audio, and without the retrieved captions.

    The audio is hidden by states of zeros, as in the evaluation's control "audio hidden".
    """
    no_audio = token_log_probs(model, replace(passage, states=torch.zeros_like(passage.states)))[0]
    return no_audio, token_log_probs(model, passage, token_mask=_caption_masks(passage)[-1:])[0]
