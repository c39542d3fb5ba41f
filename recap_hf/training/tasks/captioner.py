"""Training a captioner, `recap train`: the cross-attention (or prefix) between a frozen CLAP and a frozen GPT-2.

The defaults are the paper's recipe (Section 4): Adam at 5e-5, batches of 32, 100 epochs, k = 4, loss on the caption.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..collator import PromptedCaptions
from ..config import AT_LEAST_1, NOT_NEGATIVE, SHARE, AudioTrainingConfig, option, other_default
from ..loss import CaptionLoss
from ..plans import Row
from .captioner_data import TRAINING, TRAINING_BY_AUDIO, Corpus, build_corpus
from .prompted import PromptConfig, PromptedTask

logger = logging.getLogger(__name__)


@dataclass
class CaptionerTrainingConfig(PromptConfig, AudioTrainingConfig):
    """Every setting of a captioner's training. Names are flags (`--learning-rate`) and keys of a recipe file."""

    model: str = option("model", "", "RECAP checkpoint to start from (default: the embedded model's bases)")
    clap: str = option("model", "", "CLAP checkpoint; with --decoder, cross-attention is new (the paper's case)")
    decoder: str = option("model", "", "GPT-2 checkpoint, with --clap")
    cross_attention_reduce_factor: int = option(
        "model", 4, "width of the decoder / width of the cross-attention", check=AT_LEAST_1
    )
    conditioning: str = option(
        "model",
        "",
        "cross_attention (RECAP) or prefix (after Kim et al.; default: the checkpoint's, or cross_attention)",
        choices=["", "cross_attention", "prefix"],
    )
    prefix_length: int = option("model", 10, "embeddings of a new prefix", check=AT_LEAST_1)
    prefix_num_layers: int = option("model", 2, "layers of the network that makes a new prefix", check=AT_LEAST_1)
    audio_position_embedding: str = option(
        "model",
        "",
        "sinusoidal adds the time to encoder states, for captions that tell the order (default: the checkpoint's)",
        choices=["", "none", "sinusoidal"],
    )
    keep_cross_attention: bool | None = option(
        "model", None, "continue with the checkpoint's cross-attention or prefix (default: with --model)"
    )
    train_decoder: bool = option("model", False, "train the language model too, not only the cross-attention")
    attn_implementation: str = option(
        "model", "sdpa", "attention of the decoder: sdpa or eager", choices=["sdpa", "eager"]
    )
    datastore: list[str] = option(
        "prompts",
        ["training"],
        "'training' (the training captions), 'training-audio' (the same, found by the audio of their clips), or "
        "folder or Hub id; several are used in turn, epoch by epoch",
    )
    audio_dropout: float = option(
        "prompts", 0.0, "share of examples whose audio is hidden from the decoder", check=SHARE
    )
    share_prompts: bool = option(
        "optimisation", False, "the captions of a clip in one batch, behind one prompt that is computed once"
    )
    metric_for_best_model: str = other_default(
        AudioTrainingConfig, "metric_for_best_model", "loss", choices=["loss", "held_out_f1"]
    )
    generation_clips: int = option(
        "validation", 0, "validation clips to caption and score each time (0: none)", check=NOT_NEGATIVE
    )
    held_out_events: str = option(
        "validation", "", "JSON {event: expression}: events to leave out of training and score in validation"
    )
    push_to_hub: bool = option("running", False, "push the result to the Hub", free=True)
    hub_model_id: str = option("running", "", "repository of the model (default: the name of OUTPUT_DIR)", free=True)
    hub_datastore_id: str = option("running", "", "push the datastore to its own dataset repository", free=True)
    hub_private: bool = option("running", False, "create the repositories as private", free=True)

    def check(self) -> None:
        super().check()
        if bool(self.clap) != bool(self.decoder):
            raise ValueError("--clap and --decoder go together: a captioner needs both (or --model, which has both)")
        if self.clap and self.model:
            raise ValueError("give either --model, or --clap and --decoder")
        if {TRAINING, TRAINING_BY_AUDIO} <= set(self.datastore):
            raise ValueError("--datastore takes the training captions once: either 'training' or 'training-audio'")
        if self.metric_for_best_model == "held_out_f1" and not self.held_out_events:
            raise ValueError("--metric-for-best-model held_out_f1 needs --held-out-events FILE")

    def build_task(self, accelerator: Any) -> CaptionerTask:
        from .captioner_model import new_captioner, prepare_for_training

        if self.push_to_hub:
            _check_login()
        model, processor = new_captioner(self)
        model.to(accelerator.device)
        corpus = build_corpus(self, model, processor)
        # CLAP is not needed any more; the decoder has the device to itself.
        model.clap.to("cpu")
        prepare_for_training(model, self)
        return CaptionerTask(self, accelerator, model, processor, corpus)


def _check_login() -> None:
    """A push that cannot work is known before the training, not after it."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError("--push-to-hub needs a login: hf auth login (or HF_TOKEN in the environment)")


class CaptionerTask(PromptedTask):
    """Training of a captioner.

    Args:
        config, accelerator: see `Task`.
        model, processor: the captioner, its trained parameters requiring a gradient.
        corpus: its data.
    """

    kind = "captioner"
    config: CaptionerTrainingConfig

    def __init__(
        self, config: CaptionerTrainingConfig, accelerator: Any, model: Any, processor: Any, corpus: Corpus
    ) -> None:
        loss = CaptionLoss(model.decoder, model.prefix_mapper)
        super().__init__(config, accelerator, model, loss, corpus.train, corpus.validation, corpus.summary)
        self.processor, self.corpus = processor, corpus

    def validate(self, before_training: bool = False) -> dict[str, float]:
        if self.validation is None:
            return {}
        figures = {"loss": self.mean_loss(self.validation)}
        if before_training:
            return figures
        held_out, count = self.corpus.held_out, min(self.config.generation_clips, len(self.validation.clips))
        if count:
            captions = self.generate(self.validation, count)
            figures |= caption_scores(captions, [clip.captions for clip in self.validation.clips[:count]])
            logger.info("validation caption of %s: %s", self.validation.clips[0].clip_id, captions[0])
        if held_out is not None:
            figures |= held_out.scores(self.generate(held_out.examples, len(held_out.examples.clips)))
        return figures

    def generate(self, examples: PromptedCaptions, count: int) -> list[str]:
        """Captions of the first `count` clips, on every process."""
        from recap_hf import Captioner

        captioner = Captioner(self.model, self.processor)

        def caption(clips: range) -> list[str]:
            encoding = self._stored_encoding([examples.clips[clip].key for clip in clips])
            results = captioner.generate(encoding, [examples.retrieved(Row(clip, (0,)), 0) for clip in clips])
            return [result.caption for result in results]

        batches = self.in_batches(count, max(1, self.config.eval_batch_size // 4), caption)
        return list(chain.from_iterable(batches))

    def _stored_encoding(self, keys: list[str]) -> Any:
        from recap_hf import RecapEncoderOutput

        store, device = self.examples.features, self.accelerator.device
        blocks = [
            [torch.from_numpy(np.concatenate(store.read(key, "states"))) for key in keys],
            [torch.from_numpy(store.read(key, "embeds")) for key in keys],
        ]
        states, embeds = (torch.nn.utils.rnn.pad_sequence(own, batch_first=True).to(device) for own in blocks)
        lengths = torch.tensor([len(own) for own in blocks[0]], device=device)
        mask = (torch.arange(states.shape[1], device=device) < lengths[:, None]).long()
        states = states.to(self.model.decoder.dtype)
        return RecapEncoderOutput(last_hidden_state=states, attention_mask=mask, audio_embeds=embeds)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.corpus.datastore is not None:
            self.processor.datastore = self.corpus.datastore
        self.processor.save_pretrained(folder)

    def report(self) -> dict[str, Any]:
        datastore = self.corpus.datastore
        return {
            **super().report(),
            "encoder_fingerprint": self.examples.features.fingerprint,
            "datastore_captions": 0 if datastore is None else len(datastore),
            "conditioning": self.model.config.conditioning,
        }

    def finish(self, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
        from .captioner_card import write_card

        added = write_card(folder, report, self.config.hub_model_id)
        if self.config.push_to_hub:
            self._push(folder)
        return added

    def _push(self, folder: Path) -> None:
        from recap_hf.hub import PushOptions, push_checkpoint

        config = self.config
        options = PushOptions(private=config.hub_private or None)
        repo = config.hub_model_id or folder.resolve().name
        for result in push_checkpoint(folder, repo, options, config.hub_datastore_id or None):
            logger.info("Pushed: %s", result)


def caption_scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-4, ROUGE-L and CIDEr-D of generated captions: the metrics that need neither Java nor a model.

    Raises:
        ImportError: with the command that installs what is missing.
    """
    from recap_hf.modeling.retrieval_recap import normalize_text

    try:
        from recap_hf.scoring.metrics import bleu, cider_d, rouge_l
    except ImportError as error:
        raise ImportError('--generation-clips needs the scores: pip install "recap-hf[eval]"') from error
    captions = [normalize_text(caption) or "." for caption in captions]
    references = [[normalize_text(text) or "." for text in texts] for texts in references]
    scores = {"bleu_4": bleu(captions, references)["bleu_4"].corpus, "rouge_l": rouge_l(captions, references).corpus}
    if len(captions) > 1:
        scores["cider_d"] = cider_d(captions, references).corpus
    return {name: float(value) for name, value in scores.items()}
