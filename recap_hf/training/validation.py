"""Validation: the loss over every caption, and captions written and scored, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .batches import BatchBuilder, plan_validation
from .corpus import HeldOut
from .step import caption_sums, to_tensors


@torch.no_grad()
def validation_loss(
    loss_module: Any, builder: BatchBuilder, batch_size: int, accelerator: Any, dtype: torch.dtype
) -> float:
    """Mean cross-entropy of a caption token.

    Batches are the same whatever the number of processes and are dealt out in turn; the sums of all captions are
    gathered and added in one order, so that every process has the figure of a single one.
    """
    from accelerate.utils import gather_object

    batches = plan_validation(builder.clips, builder.prompt_lengths(), batch_size)
    was_training = loss_module.training
    loss_module.eval()
    own = []
    for number in range(accelerator.process_index, len(batches), accelerator.num_processes):
        batch = to_tensors(builder.build(batches[number]), accelerator.device, dtype)
        sums, tokens = caption_sums(loss_module(batch), batch)
        own.append((number, sums.tolist(), tokens.tolist()))
    loss_module.train(was_training)
    total = count = 0.0
    for _, sums, tokens in sorted(gather_object(own)):
        total += sum(sums)
        count += sum(tokens)
    return total / count


@torch.no_grad()
def write_captions(model: Any, builder: BatchBuilder, limit: int, batch_size: int, accelerator: Any) -> list[str]:
    """Captions of the first `limit` clips (0: all), by the model's own generation settings, on every process."""
    from accelerate.utils import gather_object

    count = min(limit, len(builder.clips)) if limit else len(builder.clips)
    numbers = list(range(count))
    groups = [numbers[start : start + batch_size] for start in range(0, count, batch_size)]
    own = []
    was_training = model.training
    model.eval()
    for group in groups[accelerator.process_index :: accelerator.num_processes]:
        own += zip(group, _caption(model, builder, group, accelerator.device), strict=True)
    model.train(was_training)
    return [caption for _, caption in sorted(gather_object(own))]


def _caption(model: Any, builder: BatchBuilder, clips: Sequence[int], device: Any) -> list[str]:
    from recap_hf import RecapEncoderOutput

    from .batches import Row

    processor = builder.processor
    retrieved = [builder.retrieved(Row(clip, (0,)), 0) for clip in clips]
    prompts = processor.build_prompts(retrieved=retrieved)
    states = [torch.from_numpy(builder.features.hidden_states(builder.clips[clip].key).copy()) for clip in clips]
    hidden = torch.nn.utils.rnn.pad_sequence(states, batch_first=True).to(device, model.decoder.dtype)
    lengths = torch.tensor([len(block) for block in states])
    mask = (torch.arange(hidden.shape[1]) < lengths[:, None]).long().to(device)
    ids = model.generate(
        encoder_outputs=RecapEncoderOutput(last_hidden_state=hidden, attention_mask=mask),
        decoder_input_ids=prompts["decoder_input_ids"].to(device),
        decoder_attention_mask=prompts["decoder_attention_mask"].to(device),
    )
    return processor.batch_decode(ids, skip_special_tokens=True)


def held_out_scores(captions: Sequence[str], held_out: HeldOut) -> dict[str, float]:
    """Precision, recall and F1 of naming the held-out events."""
    right = named = wanted = 0
    for caption, events in zip(captions, held_out.events, strict=True):
        found = {event for event, expression in held_out.expressions.items() if expression.search(caption)}
        right += len(found & events)
        named += len(found)
        wanted += len(events)
    precision, recall = right / named if named else 0.0, right / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"held_out_precision": precision, "held_out_recall": recall, "held_out_f1": f1}


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-L and CIDEr-D of written captions: what needs neither Java nor a model.

    Raises:
        ImportError: with the command that installs what is missing.
    """
    try:
        from recap_hf.scoring.metrics import bleu, cider_d, rouge_l
    except ImportError as error:
        raise ImportError('--generation-clips needs the scores: pip install "recap-hf[eval]"') from error
    captions = [_folded(caption) for caption in captions]
    references = [[_folded(text) for text in texts] for texts in references]
    scores = {"bleu_4": bleu(captions, references)["bleu_4"].corpus, "rouge_l": rouge_l(captions, references).corpus}
    if len(captions) > 1:
        scores["cider_d"] = cider_d(captions, references).corpus
    return {name: float(value) for name, value in scores.items()}


def _folded(text: str) -> str:
    from recap_hf.data.clip_ids import normalize_text

    return normalize_text(text) or "."
