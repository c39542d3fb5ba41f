"""Training-free transfer: events that the captioner never saw in a caption, named once its datastore holds captions.

Every event but man_speaking is held out once, in four fixed groups, from all captions and mixtures that the
cross-attention is trained with. CLAP and GPT-2 have seen them: what is tested is whether the captioner follows its
datastore.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .captioner import CaptionerRecipe, build_datastore, train_captioner
from .datastore import datastore_scenes
from .evaluation import Evaluator
from .evaluation_sets import Item, singles
from .lexicon import HEARD, phrases
from .naming import NamingRules, figures, outcome
from .sounds import SoundBank
from .trainer import TrainConfig

if TYPE_CHECKING:
    from recap_hf import RecapForConditionalGeneration, RecapProcessor

__all__ = ["DECOYS", "GROUPS", "evaluate_transfer", "format_transfer", "run_transfer"]

# Dealt so that each group has instruments and others; man_speaking alone is never held out.
GROUPS: tuple[tuple[str, ...], ...] = tuple(
    tuple(
        event for index, event in enumerate(event for event in HEARD if event != "man_speaking") if index % 4 == group
    )
    for group in range(4)
)
# Sounds that are nowhere in the audio.
DECOYS = (
    "a cat meowing",
    "a train whistle blowing",
    "a piano playing",
    "glass breaking",
    "a doorbell ringing",
    "a vacuum cleaner running",
)


@dataclass(frozen=True)
class _Answers:
    captions: list[str]
    outcomes: list


def _answer(evaluator: Evaluator, items: list[Item], row: str) -> _Answers:
    captions = evaluator.answers(evaluator.encode(items), row)
    outcomes = [outcome(text, set(item.events), evaluator.rules) for text, item in zip(captions, items, strict=True)]
    return _Answers(captions, outcomes)


def _naming(captions: list[str], events: tuple[str, ...], rules: NamingRules) -> float:
    return float(np.mean([bool(rules.named(text) & set(events)) for text in captions])) if captions else 0.0


def evaluate_transfer(
    model: RecapForConditionalGeneration,
    processor: RecapProcessor,
    items: list[Item],
    held_out: tuple[str, ...],
    rules: NamingRules,
    mixed: float = 1.0,
    decoding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures of one captioner that was trained without `held_out`.

    Args:
        model, processor: The captioner.
        items: Test clips of all events.
        held_out: Events that its captions never named.
        rules: What counts as naming.
        mixed: Share of the captions of several events in the datastores.
        decoding: See [`Evaluator`].
    """
    inside = [item for item in items if set(item.events) & set(held_out)]
    outside = [item for item in items if not set(item.events) & set(held_out)]
    kept = tuple(event for event in HEARD if event not in held_out)
    texts = {
        "without": [text for text, _ in datastore_scenes(kept, mixed)],
        "with": [text for text, _ in datastore_scenes(mixed=mixed)],
    }
    texts["decoy"] = texts["with"] + [phrase for key in DECOYS for phrase in phrases(key)]
    evaluator = Evaluator(model, processor, rules, decoding)
    result: dict[str, Any] = {"held_out": held_out, "clips": len(inside)}
    processor.datastore = build_datastore(model, processor, texts["without"])
    result["recall_without"] = figures(_answer(evaluator, inside, "RECAP").outcomes)["recall"]
    processor.datastore = build_datastore(model, processor, texts["with"])
    for name, row in (("recap", "RECAP"), ("language_model", "language model on the prompt")):
        values = figures(_answer(evaluator, inside, row).outcomes)
        result[name] = {"recall": values["recall"], "f1": values["f1"]}
    result["named_elsewhere"] = _naming(_answer(evaluator, outside, "RECAP").captions, held_out, rules)
    processor.datastore = build_datastore(model, processor, texts["decoy"])
    captions = _answer(evaluator, items, "RECAP").captions
    words = [phrase for key in DECOYS for phrase in phrases(key)]
    result["decoys_named"] = float(np.mean([any(word in text for word in words) for text in captions]))
    return result


def run_transfer(
    parts: tuple[str | Path, str | Path, str | Path],
    bank: SoundBank,
    sounds: str | Path,
    folder: str | Path,
    folds: tuple[int, ...],
    fold: int,
    recipe: CaptionerRecipe,
    config: TrainConfig,
    rules: NamingRules,
    groups: tuple[int, ...] = (0, 1, 2, 3),
    decoding: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train the captioners of some groups (resuming) and evaluate each on `fold`.

    Raises:
        ValueError: there is no such group.
    """
    if set(groups) - set(range(len(GROUPS))):
        raise ValueError(f"the groups of held-out events are 0 to {len(GROUPS) - 1}, got {groups}")
    items = singles(sounds, fold)
    results = []
    for number in groups:
        held_out = GROUPS[number]
        events = tuple(event for event in HEARD if event not in held_out)
        target = Path(folder) / f"group-{number}"
        model, processor = train_captioner(parts, bank, target, folds, recipe, config, events)
        result = evaluate_transfer(model, processor, items, held_out, rules, recipe.mixed, decoding)
        print(f"group {number}: {result}", file=sys.stderr, flush=True)
        results.append(result)
    return results


def format_transfer(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one group a row."""
    lines = [
        "| held out | clips | recall without | recall with | F1 with | F1 of the language model | named elsewhere "
        "| decoys named |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {', '.join(r['held_out'])} | {r['clips']} | {r['recall_without']:.3f} | {r['recap']['recall']:.3f} "
        f"| {r['recap']['f1']:.3f} | {r['language_model']['f1']:.3f} | {r['named_elsewhere']:.3f} "
        f"| {r['decoys_named']:.3f} |"
        for r in results
    ]
    return "\n".join(lines)
