"""The GPT-2 of recap-tiny, trained from scratch on retrieval prompts and captions of the grammar, then frozen.

The sounds of every text are drawn afresh from the whole vocabulary, one in four under an invented name, and the prompt
and the answer name them alike: what the answer says can only be read from the prompt, so the model learns to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from recap_hf.modeling.prompt_recap import PAPER_PROMPT
from recap_hf.pretraining.bases import new_gpt2

from .grammar import Part, Scene, answer, invented_sound, render
from .lexicon import HEARD, SPECIAL, unheard_sounds, vocabulary_sounds
from .rewording import reword
from .tokenization import draw_text_scene
from .trainer import TrainConfig, fast_attention, is_main_process, train

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

__all__ = ["LanguageModelRecipe", "build_language_model", "draw_prompt", "prompt_text", "train_language_model"]


@dataclass(frozen=True)
class LanguageModelRecipe:
    """Sizes and shares of the language model's training.

    Without `heard_words` it never reads the name of a sound that the CLAP hears: what it then says of one, it can only
    have copied.
    """

    n_layer: int = 4
    n_embd: int = 192
    n_head: int = 4
    n_positions: int = 512
    batch_size: int = 32
    heard_share: float = 0.4
    invented_share: float = 0.25
    again_share: float = 0.4
    # Share of prompts in the words of other people, of which the answer repeats one as it stands.
    reworded_share: float = 0.25
    verbatim_share: float = 0.12
    prompt_weight: float = 0.1
    heard_words: bool = True
    bfloat16: bool = True


def build_language_model(tokenizer: PreTrainedTokenizerBase, recipe: LanguageModelRecipe) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` with random weights, without cross-attention."""
    # Without dropout: every text is new, there is nothing to overfit, and a step takes half the time.
    return new_gpt2(tokenizer, recipe.n_layer, recipe.n_embd, recipe.n_head, recipe.n_positions)


def prompt_text(captions: list[str]) -> str:
    """The paper's prompt (Section 3.1) of some captions, most similar first."""
    return PAPER_PROMPT.build(captions)


def _heard_scene(rng: np.random.Generator) -> Scene:
    if rng.random() < 0.08:
        return Scene((Part(tuple(SPECIAL)[rng.integers(len(SPECIAL))]),))
    scene = draw_text_scene(rng)
    keys = tuple(HEARD)
    chosen = rng.choice(len(keys), size=len(scene.parts), replace=False)
    parts = tuple(Part(keys[index], part.attributes) for index, part in zip(chosen, scene.parts, strict=True))
    return Scene(parts, scene.relation)


def _confused_with(scene: Scene, rng: np.random.Generator, keys: tuple[str, ...]) -> Part:
    """The sound that retrieval takes one of the scene's for; of the heard ones, never one with an invented name."""
    if keys != tuple(HEARD) and rng.random() < 0.5:
        return invented_sound(rng)
    others = [key for key in keys if key not in scene.keys]
    return Part(others[rng.integers(len(others))])


def _near_scene(scene: Scene, confusion: Part, rng: np.random.Generator, keys: tuple[str, ...]) -> Scene:
    """What retrieval returns when it errs: a sound too few, too many or another one, or another order.

    Retrieval errs the same way again and again, so most wrong captions of a prompt share one confusion.
    """
    other = confusion if rng.random() < 0.6 else _confused_with(scene, rng, keys)
    parts = list(scene.parts)
    kind = rng.random()
    if len(parts) > 1 and kind < 0.25:
        return Scene((parts[rng.integers(len(parts))],))
    if len(parts) > 1 and kind < 0.33:
        return Scene(tuple(reversed(parts)), "sequence")
    if kind < (0.65, 0.45, 0.0)[len(parts) - 1]:
        parts.insert(int(rng.integers(len(parts) + 1)), other)
    else:
        parts[rng.integers(len(parts))] = other
    return Scene(tuple(parts), "sequence" if len(parts) > 1 and rng.random() < 0.4 else "overlap")


def _verbatim(rng: np.random.Generator, keys: tuple[str, ...]) -> tuple[list[str], str]:
    """Sentences of jumbled and invented words, of which the answer repeats the first: wordings are unknown, too."""

    def sentence() -> str:
        words = []
        while len(words) < rng.integers(3, 12):
            scene = draw_text_scene(rng, 0.3, keys)
            words += render(scene, rng).text.split()[: rng.integers(1, 6)]
        text = " ".join(words).rstrip(",")
        return text[0].upper() + text[1:] if rng.random() < 0.5 else text

    first = sentence()
    rest = [first if rng.random() < 0.3 else sentence() for _ in range(rng.integers(0, 4))]
    return [first, *rest], first


def draw_prompt(rng: np.random.Generator, recipe: LanguageModelRecipe) -> tuple[list[str], str]:
    """Captions that retrieval might return, most similar first, and the caption that is the answer."""
    keys = vocabulary_sounds() if recipe.heard_words else unheard_sounds()
    if rng.random() < recipe.verbatim_share:
        return _verbatim(rng, keys)
    heard = rng.random() < recipe.heard_share and recipe.heard_words

    def draw() -> Scene:
        return _heard_scene(rng) if heard else draw_text_scene(rng, recipe.invented_share, keys)

    scene = draw()
    if len(scene.parts) == 1 and rng.random() < recipe.again_share:
        # To tell what else there is, is harder than to tell what there is.
        scene = draw()
    keys = tuple(HEARD) if heard else keys
    confusion = _confused_with(scene, rng, keys)
    quality = rng.beta(1.4, 1.2)
    # Four captions mostly, as the model will be used; none when audio alone is to speak.
    count = 4 if rng.random() < 0.75 else int(rng.integers(0, 7))
    reworded = rng.random() < recipe.reworded_share
    captions: list[str] = []
    true: list[str] = []
    for rank in range(count):
        right = rng.random() < quality * 0.95**rank
        source = scene if right else _near_scene(scene, confusion, rng, keys)
        for _ in range(4):
            text = (reword(source, rng) if reworded else render(source, rng, 0.5)).text
            if text not in captions:
                captions.append(text)
                true += [text] if right else []
                break
    if reworded and captions:
        return captions, (true or captions)[0]
    return captions, answer(scene, captions)


class _Batches:
    def __init__(self, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, recipe: LanguageModelRecipe):
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe

    def __call__(self, rng: np.random.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        drawn = [draw_prompt(rng, self.recipe) for _ in range(self.recipe.batch_size)]
        prompts = self.tokenizer([prompt_text(captions) for captions, _ in drawn])["input_ids"]
        answers = self.tokenizer([" " + answer for _, answer in drawn])["input_ids"]
        length = max(len(prompt) + len(answer) + 1 for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(drawn), length), self.tokenizer.eos_token_id)
        weights = torch.zeros(len(drawn), length)
        mask = torch.zeros_like(ids)
        for row, (prompt, caption) in enumerate(zip(prompts, answers, strict=True)):
            tokens = [*prompt, *caption, self.tokenizer.eos_token_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            weights[row, : len(prompt)] = self.recipe.prompt_weight
            weights[row, len(prompt) : len(tokens)] = 1.0
        device = self.model.device
        ids, mask, weights = ids.to(device), mask.to(device), weights.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.recipe.bfloat16):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        answer_loss = losses[weights == 1].mean().item()
        return loss, {"loss": loss.item(), "answer": answer_loss}


def train_language_model(
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    recipe: LanguageModelRecipe,
    config: TrainConfig,
    stop_after: int | None = None,
) -> GPT2LMHeadModel:
    """Train the language model and save it to `folder`; resumes from `folder/checkpoint.pt`."""
    folder = Path(folder)
    torch.manual_seed(config.seed)
    model = build_language_model(tokenizer, recipe).to(config.device)
    batches = _Batches(model, tokenizer, recipe)
    with fast_attention(model):
        train(model, batches, config, folder / "checkpoint.pt", "language model", stop_after)
    if is_main_process():
        model.save_pretrained(folder)
    return model
