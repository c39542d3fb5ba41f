"""Training a captioner, `recap train`: the cross-attention (or prefix) between a frozen CLAP and a frozen GPT-2.

The defaults are the paper's recipe (Section 4): Adam at 5e-5, batches of 32, 100 epochs, k = 4, loss on the caption.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from huggingface_hub import get_token

from recap_hf import CaptionDatastore, open_datastore
from recap_hf.datastore import clip_keys
from recap_hf.files import write_text
from recap_hf.hub import PushOptions, push_checkpoint
from recap_hf.hub.facts import FACTS_FILE
from recap_hf.hub.prepare import prepare_folder
from recap_hf.modeling.configuration_recap import ENCODER_STATES, HIDDEN

from ..collator import PromptedCaptions
from ..config import AT_LEAST_1, SHARE, AudioTrainingConfig, option
from ..data import DataSummary, load_encoded, load_splits
from ..features import AudioTower
from ..loss import CaptionLoss
from ..neighbours import Query, find_neighbours
from ..text_only import Gap, measured_gap, text_clips, text_store
from .bases import new_captioner, prepare_for_training
from .prompted import PromptConfig, PromptedTask

logger = logging.getLogger(__name__)

# Names of `--datastore`: the training captions, found by their text or by the audio of their clips.
TRAINING, TRAINING_BY_AUDIO = "training", "training-audio"
_CONDITIONED_ON = {False: "recordings", True: "embeddings of captions alone: no audio was used"}
CONDITIONING_NAMES = {"cross_attention": "cross-attention", "prefix": "mapping network of the prefix"}


@dataclass
class CaptionerTrainingConfig(PromptConfig, AudioTrainingConfig):
    """Every setting of a captioner's training. Names are flags (`--learning-rate`) and keys of a recipe file."""

    text_only: list[str] = option(
        "data", [], "captions to train on without audio, instead of --dataset: what `recap datastore build` reads"
    )
    model: str = option("model", "", "RECAP checkpoint to start from (default: the embedded model's bases)")
    clap: str = option("model", "", "CLAP checkpoint; with --decoder, cross-attention is new (the paper's case)")
    decoder: str = option("model", "", "GPT-2 checkpoint, with --clap")
    cross_attention_reduce_factor: int = option("model", 4, "width of decoder / cross-attention", check=AT_LEAST_1)
    conditioning: str = option(
        "model", "", "cross-attention (RECAP) or a prefix (default: as loaded)", choices=["", *CONDITIONING_NAMES]
    )
    prefix_length: int = option("model", 10, "embeddings of a new prefix", check=AT_LEAST_1)
    prefix_num_layers: int = option("model", 2, "layers of the network that makes a new prefix", check=AT_LEAST_1)
    audio_position_embedding: str = option(
        "model", "", "time that is added to encoder states (default: as loaded)", choices=["", "none", "sinusoidal"]
    )
    encoder_states: str = option(
        "model",
        "",
        "the audio tower's hidden states, or CLAP's embeddings (default: as loaded; with --text-only embeddings)",
        choices=["", *ENCODER_STATES],
    )
    keep_cross_attention: bool | None = option(
        "model", None, "continue with the checkpoint's cross-attention or prefix (default: with --model)"
    )
    train_decoder: bool = option("model", False, "train the language model too, not only the cross-attention")
    datastore: list[str] = option(
        "prompts",
        ["training"],
        "'training' (the training captions), 'training-audio' (the same, found by the audio of their clips), or "
        "folder or Hub id; of several, each epoch uses the next one",
    )
    embedding_noise: float | None = option(
        "prompts",
        None,
        "width of Gaussian noise on embeddings (default: with --text-only that of --gap-pairs, else 0.126; else 0)",
        check=(lambda value: value is None or value >= 0, "0 or more"),
    )
    gap_pairs: str = option(
        "prompts",
        "",
        "audiofolder of a few recordings with captions: embeddings are shifted by their mean difference, and the "
        "noise is as wide as the rest of the gap",
    )
    projection_temperature: float | None = option(
        "prompts",
        None,
        "with --text-only, in captioning: a recording's embedding is replaced by the mean of those of the datastore's "
        "nearest captions, weighted by a softmax of this temperature (default: not)",
        check=(lambda value: value is None or value > 0, "more than 0"),
    )
    audio_dropout: float = option("prompts", 0.0, "share of examples whose audio is hidden", check=SHARE)
    share_prompts: bool = option("optimisation", False, "the captions of a clip together, behind one prompt")
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
        if self.text_only and (self.dataset or self.encoder_states == HIDDEN or TRAINING_BY_AUDIO in self.datastore):
            without = "--dataset, --encoder-states hidden and --datastore training-audio"
            raise ValueError(f"--text-only trains on embeddings of captions, not together with {without}")
        if not self.text_only and (self.gap_pairs or self.projection_temperature):
            raise ValueError("--gap-pairs and --projection-temperature go with --text-only")
        if {TRAINING, TRAINING_BY_AUDIO} <= set(self.datastore):
            raise ValueError("--datastore takes the training captions once: either 'training' or 'training-audio'")

    def build_task(self, accelerator: Any) -> "CaptionerTask":
        if self.push_to_hub and get_token() is None:
            # Known before the training, not after it.
            raise ValueError("--push-to-hub needs a login: hf auth login (or HF_TOKEN in the environment)")
        model, processor = new_captioner(self)
        model.to(accelerator.device)
        corpus = build_corpus(self, model, processor)
        # CLAP is not needed any more; the decoder has the device to itself.
        model.clap.to("cpu")
        prepare_for_training(model, self)
        return CaptionerTask(self, accelerator, model, processor, *corpus)

    def gap(self, model: Any, processor: Any) -> Gap:
        """Shift of and noise on embeddings.

        Raises:
            ValueError: if noise is asked for and the model is conditioned on hidden states.
        """
        if self.embedding_noise and model.config.encoder_states == HIDDEN:
            raise ValueError("--embedding-noise needs --encoder-states embedding: noise on hidden states says nothing")
        if not self.text_only:
            return Gap(self.embedding_noise or 0.0)
        gap = measured_gap(self.gap_pairs, model, processor) if self.gap_pairs else Gap()
        return gap if self.embedding_noise is None else replace(gap, noise=self.embedding_noise)


def build_corpus(
    config: CaptionerTrainingConfig, model: Any, processor: Any
) -> tuple[dict[str, PromptedCaptions], Any, DataSummary]:
    """Load, encode and search everything; what is in the caches is not computed again.

    Returns:
        The examples by split; the datastore that is saved with the captioner, None without retrieval; and the counts.
    """
    cache, fingerprint = config.cache_folder(), model.embed_fingerprint(processor)
    gap = config.gap(model, processor)
    if config.text_only:
        clips, summary = text_clips(config, config.text_only, config.share_prompts), DataSummary()
        stores = {}
        for split, own in clips.items():
            summary.add(split, own)
            records = [record for clip in own for record in clip.records()]
            stores[split] = _store_by_text(records, model, processor, fingerprint, cache)
        store = text_store(clips, stores, gap, config.seed)
    else:
        with PartialState().main_process_first():
            splits = load_splits(config)
        clips, store, summary = load_encoded(config, AudioTower(model, processor), splits)
    records = [record for clip in clips["train"] for record in clip.records()]

    def open_store(name: str) -> Any:
        if name == TRAINING:
            return _store_by_text(records, model, processor, fingerprint, cache)
        if name == TRAINING_BY_AUDIO:
            embeds = {clip.key: clip_keys(store.read(clip.key, "embeds")[None])[0] for clip in clips["train"]}
            keys = np.stack([embeds[clip.key] for clip in clips["train"] for _ in clip.captions])
            return CaptionDatastore.from_embeddings(records, keys, fingerprint, keys="audio")
        opened = open_datastore(name, model, processor)
        opened.check_encoder(fingerprint)
        return opened

    datastores, examples = [open_store(name) for name in config.datastore if config.num_retrieved], {}
    top = config.draw_from or config.num_retrieved
    for split, own in clips.items():
        texts: dict[str, list[str]] = {}
        for clip in own:
            texts.setdefault(clip.clip_id, []).extend(clip.captions)
        queries = [Query(store.read(clip.key, "embeds"), clip.clip_id, tuple(texts[clip.clip_id])) for clip in own]
        tables = [find_neighbours(each, queries, top, cache, config.retrieval_diversity) for each in datastores]
        examples[split] = config.examples(
            split, own, processor, tables, store, gap.noise, audio_dropout=config.audio_dropout
        )
    return examples, datastores[0] if datastores else None, summary


def _store_by_text(records: list[dict], model: Any, processor: Any, fingerprint: np.ndarray, cache: Path) -> Any:
    """A datastore of the training captions, embedded once for all processes and later runs."""
    digest = hashlib.blake2b(np.round(fingerprint, 4).astype(np.float32).tobytes(), digest_size=8)
    digest.update(json.dumps(records, sort_keys=True).encode())
    folder, state = cache / f"datastore-{digest.hexdigest()}", PartialState()
    if state.is_main_process and not (folder / "datastore.json").is_file():
        logger.info("Embedding %d captions for the datastore", len(records))
        CaptionDatastore.from_captions(records, model, processor).save_pretrained(folder)
    state.wait_for_everyone()
    return CaptionDatastore.from_pretrained(folder)


class CaptionerTask(PromptedTask):
    """Training of a captioner.

    Args:
        config, accelerator: see `Task`.
        model, processor: the captioner, its trained parameters requiring a gradient.
        examples, datastore, summary: from `build_corpus`.
    """

    kind = "captioner"
    config: CaptionerTrainingConfig

    def __init__(
        self,
        config: CaptionerTrainingConfig,
        accelerator: Any,
        model: Any,
        processor: Any,
        examples: dict[str, PromptedCaptions],
        datastore: Any,
        summary: DataSummary,
    ) -> None:
        loss = CaptionLoss(model.decoder, model.prefix_mapper)
        super().__init__(config, accelerator, model, loss, examples, summary)
        self.processor, self.datastore = processor, datastore

    def validate(self) -> dict[str, float]:
        return {} if self.validation is None else {"loss": self.mean_loss(self.validation)}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.datastore is not None:
            self.processor.datastore = self.datastore
        self.processor.save_pretrained(folder)

    def report(self) -> dict[str, Any]:
        return {
            **super().report(),
            "encoder_fingerprint": self.examples.features.fingerprint,
            "datastore_captions": len(self.datastore or ()),
            "conditioning": self.model.config.conditioning,
            "encoder_states": self.model.config.encoder_states,
            "embedding_noise": self.examples.options.embedding_noise,
        }

    def finish(self, folder: Path, report: dict[str, Any]) -> None:
        config, repo = self.config, self.config.hub_model_id or folder.resolve().name
        write_text(folder / FACTS_FILE, json.dumps(card_facts(report), indent=2) + "\n")
        prepare_folder(folder, repo)
        if config.push_to_hub:
            options = PushOptions(private=config.hub_private or None)
            for result in push_checkpoint(folder, repo, options, config.hub_datastore_id or None):
                logger.info("Pushed: %s", result)


def card_facts(report: dict[str, Any]) -> dict[str, Any]:
    """What the model card says of a run, with the keys of `recap_hf.hub.facts`."""
    settings, data, best = report["settings"], report["data"], report["best"]
    use = CONDITIONING_NAMES[report["conditioning"]] + (" and language model" if settings["train_decoder"] else "")
    last = best["value"] is None
    training = {
        "trained": f"{use}, {report['trained_parameters']:,} parameters",
        "optimiser": f"Adam, learning rate {settings['learning_rate']:g}, {settings['lr_scheduler_type']} schedule",
        "batch": f"{report['global_batch_size']} captions",
        "steps": f"{report['steps']:,} ({report['steps'] / report['steps_per_epoch']:.1f} epochs)",
        "retrieved captions in a prompt": str(settings["num_retrieved"] or "none"),
        "drawn from the nearest": str(settings["draw_from"] or settings["num_retrieved"]),
        "audio hidden": f"{settings['audio_dropout']:.0%} of the examples",
        "conditioned in training on": _CONDITIONED_ON[bool(settings["text_only"])],
        "loss": "cross-entropy on the caption's tokens",
        "checkpoint": "the last step" if last else f"step {best['step']}, the best {best['metric']} in validation",
        "seed": str(settings["seed"]),
        "captions a second": str(report["captions_per_second"]),
    }
    sources = [{**source, "use": use} for source in data["sources"]]
    result = {
        "metric": "validation loss",
        "value": round((report["best_evaluation"] or {}).get("loss", 0.0), 4),
        "dataset": ", ".join(source["name"] for source in sources),
        "implementation": f"recap_hf {report['versions']['recap_hf']}",
        "split": "validation",
        "clips": data["splits"].get("validation", {}).get("clips"),
    }
    return {"training_data": sources, "training": training, "results": [] if last else [result]}
