"""RECAP proper: CLAP and GPT-2 frozen, only the cross-attention trained, with retrieved prompts.

Audio is encoded once for a pool of mixtures; prompts and target wordings are drawn afresh in every step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recap_hf.modeling.outputs_recap import position_ids_of
from recap_hf.training.step import CaptionLoss, TensorBatch, fuse_activations

from .clap import audio_batch
from .datastore import datastore_scenes
from .grammar import Part, Scene, answer, invented_sound, render
from .language_model import LanguageModelRecipe, draw_prompt
from .lexicon import HEARD, other_sounds
from .mixtures import MixtureConfig, draw_example
from .rewording import reword
from .sounds import SoundBank
from .trainer import TrainConfig, fast_attention, is_main_process, steps_done, train

if TYPE_CHECKING:
    from transformers import BatchFeature

    from recap_hf import CaptionDatastore, RecapForConditionalGeneration, RecapProcessor

# Prompts about sounds that only the vocabulary knows: an ear that recognises nothing leaves the word to its datastore.
FOREIGN_PROMPTS = LanguageModelRecipe(heard_share=0.0, verbatim_share=0.0)

# Recordings varied so much that the encoder errs on them about as often as on new ones, and more of them mixed than
# the encoder was trained with: a second sound is the harder thing to tell, and whoever is in doubt leaves it out.
_MIXTURES = replace(
    MixtureConfig().strongly_varied(),
    scenes=(
        ("single", 0.28),
        ("count", 0.04),
        ("overlap", 0.33),
        ("sequence", 0.25),
        ("three", 0.03),
        ("special", 0.07),
    ),
)

__all__ = ["CaptionerRecipe", "assemble", "fit", "save_recap_tiny", "train_captioner"]


@dataclass(frozen=True)
class CaptionerRecipe:
    """Sizes and shares of the training of the cross-attention.

    `first_exact` is in what share of the mixtures the caption nearest to one names its sounds and no other. The
    encoder knows the recordings of this training, and would retrieve better than it ever will again: to the audio
    embeddings random vectors are added, as long as it takes. An encoder that has been trained better thus does not
    make a captioner that trusts it more.

    `depth` is between how many of the nearest captions those of a prompt are drawn: few, because captions that are
    wrong together are what it will meet.

    `mixed` is the share of captions of several events that the datastore keeps: with more of them the first caption
    of a mixture is more often exact, and that of a single clip more often names something besides.
    """

    cross_attention_reduce_factor: int = 1
    audio_position_embedding: str | None = "sinusoidal"
    num_retrieved: int = 4
    mixed: float = 0.5
    pool: int = 8000
    batch_size: int = 32
    depth: tuple[int, int] = (4, 8)
    first_exact: float = 0.45
    hidden_share: float = 0.1
    renamed_share: float = 0.35
    reworded_share: float = 0.04
    foreign_share: float = 0.015
    # Steps at the beginning without any prompt: to listen is learned faster where there is nothing to read, and a
    # step costs a fifth.
    listening_steps: int = 1500
    promptless_share: float = 0.2
    bfloat16: bool = True
    mixtures: MixtureConfig = _MIXTURES
    # Of the beam search: captions of two sounds are longer, and each word more costs probability.
    length_penalty: float = 0.2
    num_beams: int = 5
    # Shares of every word's probability that come from listening alone and from reading alone. The captioner knows its
    # recordings and so trusts a prompt too much; listening does not read what is not there, and what the ear has no
    # word for, only the reader says.
    promptless_weight: float = 0.4
    soundless_weight: float = 0.3
    rerank_weight: float = 6.0


def assemble(
    clap: str | Path, language_model: str | Path, tokenizers: str | Path, recipe: CaptionerRecipe
) -> tuple[RecapForConditionalGeneration, RecapProcessor]:
    """The captioner with an untrained cross-attention, and its processor without a datastore."""
    from transformers import AutoTokenizer

    from recap_hf import RecapForConditionalGeneration, RecapProcessor

    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        clap,
        language_model,
        cross_attention_reduce_factor=recipe.cross_attention_reduce_factor,
        audio_position_embedding=recipe.audio_position_embedding,
        num_retrieved_captions=recipe.num_retrieved,
    )
    tokenizers = Path(tokenizers)
    processor = RecapProcessor.from_config(
        model.config,
        AutoTokenizer.from_pretrained(tokenizers / "gpt2"),
        AutoTokenizer.from_pretrained(tokenizers / "clap"),
    )
    set_decoding(model, processor, recipe)
    return model, processor


def set_decoding(model: RecapForConditionalGeneration, processor: RecapProcessor, recipe: CaptionerRecipe) -> None:
    """Write the recipe's decoding into the generation configuration, which is saved with the checkpoint."""
    config = model.generation_config
    for name in ("length_penalty", "num_beams", "promptless_weight", "soundless_weight", "rerank_weight"):
        setattr(config, name, getattr(recipe, name))
    config.rerank = "clap"
    config.promptless_input_ids = processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0].tolist()


def build_datastore(
    model: RecapForConditionalGeneration, processor: RecapProcessor, captions: list[str]
) -> CaptionDatastore:
    """Captions of the grammar as a datastore of this model."""
    from recap_hf import CaptionDatastore

    records = [{"caption": text, "source": "recap_hf grammar", "licence": "Apache-2.0"} for text in captions]
    return CaptionDatastore.from_captions(records, model, processor)


@dataclass
class _Pool:
    """Encoded mixtures with their scenes and the rows of the captions nearest to each."""

    states: torch.Tensor
    scenes: list[Scene]
    rows: np.ndarray


@torch.no_grad()
def _encode_pool(
    model: RecapForConditionalGeneration,
    store: CaptionDatastore,
    captions: list[Scene],
    bank: SoundBank,
    folds: tuple[int, ...],
    events: tuple[str, ...],
    recipe: CaptionerRecipe,
    seed: int,
) -> _Pool:
    states, scenes, embeds = [], [], []
    for start in range(0, recipe.pool, 64):
        rng = np.random.default_rng([seed, 0x9001, start])
        examples = [
            draw_example(bank, folds, rng, recipe.mixtures, events) for _ in range(min(64, recipe.pool - start))
        ]
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16):
            encoding = model.encode_audio(input_features=audio_batch(examples, model.device))
        states.append(encoding.last_hidden_state.to(torch.bfloat16))
        embeds.append(encoding.audio_embeds[:, 0].float().cpu().numpy())
        scenes += [example.scene for example in examples]
    queries, keys = np.concatenate(embeds), np.asarray(store.embeddings, dtype=np.float32).T
    noise = np.random.default_rng([seed, 0x901E]).standard_normal(queries.shape) / np.sqrt(queries.shape[1])
    similarity, disturbance = queries @ keys, noise.astype(np.float32) @ keys
    similarity += noise_length(similarity, disturbance, scenes, captions, recipe.first_exact) * disturbance
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, : recipe.depth[1] + 1]
    return _Pool(torch.cat(states), scenes, rows)


def noise_length(
    similarity: np.ndarray, disturbance: np.ndarray, scenes: list[Scene], captions: list[Scene], first_exact: float
) -> float:
    """Factor of a disturbance at which the nearest caption is exact as often as asked; 0 where it is not oftener.

    Args:
        similarity: (scenes, captions).
        disturbance: what a factor of 1 adds to it.
        scenes: what was heard; those without any of the sounds that the encoder knows do not count.
        captions: what the captions say.
        first_exact: share of the scenes.
    """
    heard = frozenset(HEARD)
    counted = [row for row, scene in enumerate(scenes) if scene.keys & heard]
    wanted = [scenes[row].keys & heard for row in counted]
    named = [caption.keys & heard for caption in captions]
    similarity, disturbance = similarity[counted], disturbance[counted]

    def share(factor: float) -> float:
        nearest = (similarity + np.float32(factor) * disturbance).argmax(axis=1)
        return float(np.mean([named[index] == keys for index, keys in zip(nearest, wanted, strict=True)]))

    low, high = 0.0, 1.0
    if not counted or share(low) <= first_exact:
        return low
    while share(high) > first_exact and high < 64:
        low, high = high, 2 * high
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > first_exact else (low, middle)
    return high


def _renaming(keys: list[str], rng: np.random.Generator) -> dict[str, Part]:
    """Some of the events under the name of a sound that is not heard, or under an invented one.

    Beside sounds that keep their names, as in a datastore that somebody has added sounds of their own to: what the ear
    has no word for can only be the sound with the unknown name.
    """
    names = list(other_sounds())
    renamed = [key for key in keys if key in HEARD and rng.random() < 0.6]
    chosen = rng.choice(len(names), size=len(renamed), replace=False)
    return {
        key: invented_sound(rng) if rng.random() < 0.3 else Part(names[index])
        for key, index in zip(renamed, chosen, strict=True)
    }


def _rename(scene: Scene, names: dict[str, Part]) -> Scene:
    parts = tuple(
        replace(names[part.key], attributes=part.attributes) if part.key in names else part for part in scene.parts
    )
    return replace(scene, parts=parts)


def fit(caption: Scene, scene: Scene) -> tuple[int, bool]:
    """How well a caption's scene tells another: sounds in common less those that are not there; then the order."""
    shared = len(caption.keys & scene.keys)
    return 2 * shared - len(caption.keys), caption.order in (None, scene.order)


def _tensor_batch(inputs: BatchFeature, states: torch.Tensor) -> TensorBatch:
    """What `build_training_inputs` returned, with the places at which a token of a caption is due."""
    ids, mask, following = inputs["decoder_input_ids"], inputs["decoder_attention_mask"], inputs["labels"][:, 1:]
    rows, columns = (following != -100).nonzero(as_tuple=True)
    targets = following[rows, columns]
    return TensorBatch(ids, position_ids_of(mask), mask, states, None, rows, columns, targets, rows)


class _Batches:
    def __init__(self, model, processor, pool: _Pool, captions: list[tuple[str, Scene]], recipe: CaptionerRecipe):
        self.processor, self.pool = processor, pool
        self.captions, self.recipe = captions, recipe
        fuse_activations(model.decoder)
        self.token_losses = CaptionLoss(model.decoder)
        # Among sounds that are not recognised, so many that the share of all examples is the recipe's.
        unknown = np.mean(["unknown" in scene.keys for scene in pool.scenes])
        self.foreign_share = recipe.foreign_share / unknown if unknown else 0.0

    def _hits(self, row: int, rng: np.random.Generator) -> list[tuple[str, Scene]]:
        """Some of the captions nearest to an example."""
        recipe = self.recipe
        depth = int(rng.integers(recipe.depth[0], recipe.depth[1] + 1))
        near = self.pool.rows[row][:depth]
        chosen = sorted(rng.choice(len(near), size=min(recipe.num_retrieved, len(near)), replace=False))
        return [self.captions[near[index]] for index in chosen]

    def _example(self, row: int, rng: np.random.Generator, promptless_share: float) -> tuple[list[str], str]:
        """The captions of a prompt, none where audio alone is to speak, and the answer to it."""
        scene = self.pool.scenes[row]
        if rng.random() < promptless_share:
            return [], answer(scene, [])
        if "unknown" in scene.keys and rng.random() < self.foreign_share:
            return draw_prompt(rng, FOREIGN_PROMPTS)
        hits = self._hits(row, rng)
        captions, scenes = [text for text, _ in hits], [hit for _, hit in hits]
        if rng.random() < self.recipe.renamed_share:
            names = _renaming(sorted(scene.keys.union(*(hit.keys for hit in scenes))), rng)
            scene, scenes = _rename(scene, names), [_rename(hit, names) for hit in scenes]
            captions = [
                render(new, rng, 1.0, 1.0).text if new != old else text
                for (text, old), new in zip(hits, scenes, strict=True)
            ]
        if rng.random() < self.recipe.reworded_share:
            captions = [reword(hit, rng).text for hit in scenes]
            best = max(range(len(scenes)), key=lambda index: fit(scenes[index], scene))
            # The words of others are repeated as they stand, where they say anything that is there.
            return captions, captions[best] if scenes[best].keys & scene.keys else answer(scene, [])
        return captions, answer(scene, captions)

    def __call__(self, rng: np.random.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        recipe, pool = self.recipe, self.pool
        rows = rng.integers(len(pool.scenes), size=recipe.batch_size)
        share = 1.0 if step < recipe.listening_steps else recipe.promptless_share
        prompts, targets = zip(*(self._example(row, rng, share) for row in rows), strict=True)
        device = pool.states.device
        inputs = self.processor.build_training_inputs(list(prompts), list(targets)).to(device)
        states = pool.states[torch.from_numpy(rows).to(device)].float()
        hidden = torch.from_numpy(rng.random(len(rows)) < recipe.hidden_share)
        states[hidden.to(device)] = 0.0
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16):
            loss = self.token_losses(_tensor_batch(inputs, states)).mean()
        return loss, {"loss": loss.item()}


def train_captioner(
    parts: tuple[str | Path, str | Path, str | Path],
    bank: SoundBank,
    folder: str | Path,
    folds: tuple[int, ...],
    recipe: CaptionerRecipe,
    config: TrainConfig,
    events: tuple[str, ...] = tuple(HEARD),
    stop_after: int | None = None,
) -> tuple[RecapForConditionalGeneration, RecapProcessor]:
    """Train the cross-attention on mixtures of `folds` and save the finished checkpoint to `folder`.

    Args:
        parts: Folders of the CLAP, the language model and the tokenizers.
        bank: The source clips.
        folder: Where checkpoint and result go; the result is `folder/model`.
        folds: Folds that may be heard.
        recipe: Sizes and shares.
        config: Optimisation.
        events: Events that the captions of this training may name.
        stop_after: Stop after so many steps; resumes.
    """
    torch.manual_seed(config.seed)
    model, processor = assemble(*parts, recipe)
    model.to(config.device)
    captions = datastore_scenes(events, recipe.mixed)
    processor.datastore = build_datastore(model, processor, [text for text, _ in captions])
    model.freeze_base()
    scenes = [scene for _, scene in captions]
    checkpoint, batches = Path(folder) / "checkpoint.pt", None
    if steps_done(checkpoint) < (config.steps if stop_after is None else min(stop_after, config.steps)):
        # Not for a run that is only to be loaded: encoding takes longer than that.
        pool = _encode_pool(model, processor.datastore, scenes, bank, folds, events, recipe, config.seed)
        batches = _Batches(model, processor, pool, captions, recipe)
    with fast_attention(model.decoder):
        train(model, batches, config, checkpoint, "captioner", stop_after)
    if is_main_process():
        save_recap_tiny(model, processor, Path(folder) / "model")
    return model.eval(), processor


def _tidy(config: dict[str, Any]) -> None:
    """Say float32, and forget the folders that the parts were loaded from."""
    config.pop("_name_or_path", None)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = "float32"
        elif isinstance(value, dict):
            _tidy(value)


def save_recap_tiny(model: RecapForConditionalGeneration, processor: RecapProcessor, folder: str | Path) -> None:
    """Save with weights in float16 and a configuration that says float32: half the size, loaded as float32.

    Without the code that otherwise travels with a checkpoint: this one lives in the package.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    halved = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _tidy(config)
    for copy in folder.glob("*_recap.py"):
        copy.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
