"""Evaluation of recap-tiny beside its controls: the table of the model card.

Every row answers the same clips; what a row may use is in its name. A figure without its controls says nothing here: a
captioner that only copies its prompt looks as good as its retrieval.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recap_hf.modeling.readings_recap import WEIGHTS, Readings, reading_options
from recap_hf.modeling.reranking_recap import NOT_RERANKED, Choice, caption_similarities, generate_captions

from .evaluation_sets import (
    DEGRADATIONS,
    Item,
    degrade_waveform,
    mixture_hash,
    mixture_list,
    mixtures,
    no_events,
    singles,
)
from .lexicon import HEARD, INSTRUMENTS, SPECIAL, phrases
from .naming import NamingRules, bootstrap, figures, names_special, order_said, outcome
from .sounds import SAMPLING_RATE

if TYPE_CHECKING:
    from recap_hf import RecapEncoderOutput, RecapForConditionalGeneration, RecapProcessor

__all__ = ["ROWS", "Evaluator", "evaluate", "format_table"]

# Each control uses what RECAP uses, less something.
ROWS = (
    "text-prompt classifier",
    "first retrieved caption",
    "all events of the captions",
    "events in 3 of 4 captions",
    "language model on the prompt",
    "language model, chosen by CLAP",
    "RECAP, audio hidden",
    "RECAP, audio only",
    "RECAP, random prompt",
    "RECAP, another clip's prompt",
    "RECAP",
)
_BATCH = 32


@dataclass
class _Encoded:
    """States (N, n, d), query embeddings (N, 1, P) and retrieved captions of some items."""

    items: list[Item]
    states: torch.Tensor
    embeds: torch.Tensor
    retrieved: list[list[str]]


class Evaluator:
    """Runs one checkpoint on sets of items, with one setting of decoding.

    Args:
        model, processor: The checkpoint.
        rules: What counts as naming.
        decoding: Options of `generate` and of [`Choice`] in the place of the checkpoint's own, for every row to which
            they mean anything.
    """

    def __init__(
        self,
        model: RecapForConditionalGeneration,
        processor: RecapProcessor,
        rules: NamingRules,
        decoding: Mapping[str, Any] | None = None,
    ):
        self.model, self.processor, self.rules = model.eval(), processor, rules
        self.decoding = dict(decoding or {})
        self.choice = Choice.of(self.decoding, model.generation_config)
        self.k = processor.num_retrieved_captions
        names = [phrases(event)[0] for event in HEARD]
        self._prompts = model.embed_captions(names, processor)
        others = [phrases(key)[0] for key in SPECIAL]
        self._all_names = names + others
        self._all_prompts = model.embed_captions(self._all_names, processor)

    @torch.no_grad()
    def encode(self, items: list[Item]) -> _Encoded:
        """One pass of the audio tower, and the retrieval."""
        states, embeds = [], []
        for start in range(0, len(items), _BATCH):
            clips = [item.waveform.astype(np.float32) for item in items[start : start + _BATCH]]
            inputs = self.processor(audio=clips, sampling_rate=SAMPLING_RATE, return_tensors="pt")
            encoding = self.model.encode_audio(**inputs.to(self.model.device))
            states.append(encoding.last_hidden_state)
            embeds.append(encoding.audio_embeds.cpu())
        all_embeds = torch.cat(embeds)
        hits = self.processor.retrieve(all_embeds, self.k)
        return _Encoded(items, torch.cat(states), all_embeds, [[hit["caption"] for hit in row] for row in hits])

    def generate(self, states: torch.Tensor, embeds: torch.Tensor | None, prompts: list[list[str]]) -> list[str]:
        """Captions of prompts; without `embeds` CLAP has no say in them."""
        decoding = self.decoding if embeds is not None else {**self.decoding, **NOT_RERANKED}
        captions: list[str] = []
        for start in range(0, len(prompts), _BATCH):
            part = slice(start, start + _BATCH)
            built = self.processor.build_prompts(retrieved=prompts[part]).to(self.model.device)
            retrieved = built.pop("retrieved")
            encoding = _encoding(states[part], None if embeds is None else embeds[part])
            ids, _, _ = generate_captions(self.model, self.processor, encoding, built, retrieved, **decoding)
            captions += self.processor.batch_decode(ids, skip_special_tokens=True)
        return captions

    @torch.no_grad()
    def read(self, encoded: _Encoded, chosen: bool) -> list[str]:
        """Captions of the frozen language model alone; `chosen` among its own by the rule of this decoding."""
        config = copy.deepcopy(self.model.generation_config)
        count = self.choice.candidates or config.num_beams
        count = count if chosen and self.choice.rerank else 1
        config.num_beams, config.num_return_sequences = max(config.num_beams, count), count
        # A greedy search has no scores, and nothing to choose from.
        config.return_dict_in_generate = config.output_scores = count > 1
        captions: list[str] = []
        for start in range(0, len(encoded.items), _BATCH):
            part = slice(start, start + _BATCH)
            built = self.processor.build_prompts(retrieved=encoded.retrieved[part]).to(self.model.device)
            found = self.model.decoder.generate(
                built["decoder_input_ids"], attention_mask=built["decoder_attention_mask"], generation_config=config
            )
            said = self.processor.batch_decode(getattr(found, "sequences", found), skip_special_tokens=True)
            if count > 1:
                embeds = encoded.embeds[part].repeat_interleave(count, dim=0)
                similarities = caption_similarities(self.model, self.processor, said, embeds)
                values = self.choice.values(found.sequences_scores.cpu().numpy(), similarities).reshape(-1, count)
                said = [said[row * count + best] for row, best in enumerate(values.argmax(axis=1))]
            captions += said
        return captions

    def settings(self) -> dict[str, Any]:
        """The decoding, as the result says it."""
        config, choice = self.model.generation_config, self.choice
        readings = Readings.of(reading_options(self.processor, self.decoding, config), config)
        settings = {"num_beams": config.num_beams, "length_penalty": config.length_penalty}
        settings |= {name: getattr(readings, name) for name in WEIGHTS}
        return settings | {"rerank": choice.rerank, "candidates": choice.candidates, "rerank_weight": choice.weight}

    def classify(self, encoded: _Encoded) -> list[str]:
        """The text-prompt classifier's event (of the 21 alone) for each item."""
        similarity = encoded.embeds[:, 0].numpy() @ self._prompts.T
        return [tuple(HEARD)[index] for index in similarity.argmax(axis=1)]

    def answers(self, encoded: _Encoded, row: str, seed: int = 0) -> list[str]:
        """Captions of one row of the table.

        Raises:
            KeyError: no such row.
        """
        prompts, states = encoded.retrieved, encoded.states
        if row == "text-prompt classifier":
            similarity = encoded.embeds[:, 0].numpy() @ self._all_prompts.T
            return [self._all_names[index] for index in similarity.argmax(axis=1)]
        if row == "first retrieved caption":
            return [captions[0] for captions in prompts]
        if row == "all events of the captions":
            return [" and ".join(captions) for captions in prompts]
        if row == "events in 3 of 4 captions":
            return [self._frequent(captions) for captions in prompts]
        if row == "language model on the prompt":
            return self.read(encoded, chosen=False)
        if row == "language model, chosen by CLAP":
            return self.read(encoded, chosen=True)
        if row == "RECAP, audio hidden":
            return self.generate(torch.zeros_like(states), None, prompts)
        if row == "RECAP, audio only":
            return self.generate(states, encoded.embeds, [[] for _ in prompts])
        if row == "RECAP, random prompt":
            rng = np.random.default_rng(seed)
            store = self.processor.datastore.captions
            drawn = [[store[i] for i in rng.choice(len(store), self.k, replace=False)] for _ in prompts]
            return self.generate(states, encoded.embeds, drawn)
        if row == "RECAP, another clip's prompt":
            shift = np.random.default_rng(seed).permutation(len(prompts))
            other = {int(a): int(b) for a, b in zip(shift, np.roll(shift, 1), strict=True)}
            return self.generate(states, encoded.embeds, [prompts[other[index]] for index in range(len(prompts))])
        if row == "RECAP":
            return self.generate(states, encoded.embeds, prompts)
        raise KeyError(row)

    def _frequent(self, captions: list[str]) -> str:
        named = [self.rules.named(caption) for caption in captions]
        needed = int(np.ceil(0.75 * self.k))
        events = [event for event in HEARD if sum(event in names for names in named) >= needed]
        return " and ".join(phrases(event)[0] for event in events)


def _encoding(states: torch.Tensor, embeds: torch.Tensor | None) -> RecapEncoderOutput:
    from recap_hf import RecapEncoderOutput

    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    return RecapEncoderOutput(last_hidden_state=states, attention_mask=mask, audio_embeds=embeds)


def _table(evaluator: Evaluator, encoded: _Encoded, rows: tuple[str, ...]) -> dict[str, Any]:
    truths = [set(item.events) for item in encoded.items]
    outcomes, captions = {}, {}
    for row in rows:
        captions[row] = evaluator.answers(encoded, row)
        outcomes[row] = [
            outcome(text, truth, evaluator.rules) for text, truth in zip(captions[row], truths, strict=True)
        ]
        print(f"  {row}: F1 {figures(outcomes[row])['f1']:.3f}", file=sys.stderr, flush=True)
    table = {}
    for row in rows:
        table[row] = {"figures": figures(outcomes[row]), "interval": bootstrap(outcomes[row])}
        if row != "RECAP":
            table[row]["recap_minus_row"] = bootstrap(outcomes["RECAP"], outcomes[row])
    return {"rows": table, "captions": captions["RECAP"], "clips": len(truths)}


def _accuracy(evaluator: Evaluator, encoded: _Encoded) -> dict[str, Any]:
    """Accuracy of the text-prompt classifier over 21 events: micro, and macro-averaged, and per event."""
    said = evaluator.classify(encoded)
    right: dict[str, list[bool]] = {}
    for item, event in zip(encoded.items, said, strict=True):
        right.setdefault(item.events[0], []).append(event == item.events[0])
    per_event = {event: float(np.mean(right[event])) for event in HEARD if event in right}
    plain = [event for event in per_event if event not in INSTRUMENTS]
    micro = [hit for event in plain for hit in right[event]]
    return {
        "not_instruments_macro": float(np.mean([per_event[event] for event in plain])),
        "not_instruments_micro": float(np.mean(micro)),
        "all_macro": float(np.mean(list(per_event.values()))),
        "all_micro": float(np.mean([hit for hits in right.values() for hit in hits])),
        "per_event": per_event,
    }


def _order(items: list[Item], captions: list[str], rules: NamingRules) -> dict[str, Any]:
    """Of the sequences in which both events are named: how many say an order, and how many the right one."""
    both = said = right = 0
    for item, caption in zip(items, captions, strict=True):
        if item.sequence and set(item.events) <= rules.named(caption):
            both += 1
            answer = order_said(caption, *item.events, rules)
            said += answer is not None
            right += bool(answer)
    return {"named_both": both, "said_order": said, "right": right, "share": right / both if both else 0.0}


def _first_caption(encoded: _Encoded, rules: NamingRules) -> dict[str, float]:
    """How often the first retrieved caption is exact, and how often it names all that is there and more."""
    exact = superset = 0
    for item, captions in zip(encoded.items, encoded.retrieved, strict=True):
        named, truth = rules.named(captions[0]), set(item.events)
        exact += named == truth
        superset += named > truth
    return {"exact": exact / len(encoded.items), "superset": superset / len(encoded.items)}


def _no_events(evaluator: Evaluator, fold: int) -> dict[str, Any]:
    """False naming on silence, noise, tones and other synthetic sounds."""
    encoded = evaluator.encode(no_events(fold))
    captions = evaluator.answers(encoded, "RECAP")
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for item, caption in zip(encoded.items, captions, strict=True):
        false = bool(evaluator.rules.named(caption) or evaluator.rules.foreign_words(caption))
        groups.setdefault(item.name.split("/")[0], []).append((false, names_special(caption)))
    result = {
        kind: {
            "clips": len(pairs),
            "false_naming": float(np.mean([false for false, _ in pairs])),
            "honest": float(np.mean([honest for _, honest in pairs])),
        }
        for kind, pairs in groups.items()
    }
    pairs = [pair for group in groups.values() for pair in group]
    result["all"] = {"clips": len(pairs), "false_naming": float(np.mean([false for false, _ in pairs]))}
    return result


def _degraded(evaluator: Evaluator, items: list[Item]) -> dict[str, Any]:
    result = {}
    for kind in DEGRADATIONS:
        worse = [Item(item.name, degrade_waveform(item.waveform, kind), item.events) for item in items]
        encoded = evaluator.encode(worse)
        captions = evaluator.answers(encoded, "RECAP")
        outcomes = [
            outcome(text, set(item.events), evaluator.rules) for text, item in zip(captions, worse, strict=True)
        ]
        result[kind] = {"accuracy_all_micro": _accuracy(evaluator, encoded)["all_micro"], **figures(outcomes)}
        print(f"  {kind}: F1 {result[kind]['f1']:.3f}", file=sys.stderr, flush=True)
    return result


def evaluate(
    model: RecapForConditionalGeneration,
    processor: RecapProcessor,
    sounds: str | Path,
    fold: int,
    rules: NamingRules | None = None,
    quick: bool = False,
    rows: tuple[str, ...] = ROWS,
    decoding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every figure of the model card for one fold.

    Args:
        model, processor: The checkpoint.
        sounds: Folder of recordings.
        fold: Fold that is heard.
        rules: What counts as naming; the project's own by default.
        quick: Single clips alone.
        rows: Rows of the table; "RECAP" must be among them.
        decoding: See [`Evaluator`].
    """
    evaluator = Evaluator(model, processor, rules or NamingRules.ours(), decoding)
    items = singles(sounds, fold)
    encoded = evaluator.encode(items)
    print(f"single clips of fold {fold}", file=sys.stderr)
    result: dict[str, Any] = {
        "fold": fold,
        "decoding": evaluator.settings(),
        "text_prompt_accuracy": _accuracy(evaluator, encoded),
        "first_caption": _first_caption(encoded, evaluator.rules),
        "singles": _table(evaluator, encoded, rows),
    }
    result["singles"]["names"] = [item.name for item in items]
    if quick:
        return result
    entries = mixture_list(sounds, fold)
    print("mixtures", file=sys.stderr)
    mixed = evaluator.encode(mixtures(sounds, entries))
    result["mixtures"] = _table(evaluator, mixed, rows)
    result["mixtures"]["hash"] = mixture_hash(entries)
    result["mixtures"]["order"] = _order(mixed.items, result["mixtures"]["captions"], evaluator.rules)
    for kind in ("overlap", "sequence"):
        chosen = [index for index, entry in enumerate(entries) if entry["kind"] == kind]
        outcomes = [
            outcome(result["mixtures"]["captions"][i], set(entries[i]["events"]), evaluator.rules) for i in chosen
        ]
        result["mixtures"][kind] = figures(outcomes)
    result["no_events"] = _no_events(evaluator, fold)
    print("degraded", file=sys.stderr)
    result["degraded"] = _degraded(evaluator, items)
    return result


def _rows_as_text(table: dict[str, Any]) -> list[str]:
    lines = ["| row | precision | recall | F1 [95 %] | exact set | events | RECAP - row, F1 [95 %] |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row, values in table["rows"].items():
        value, (low, high) = values["figures"], values["interval"]["f1"]
        paired = "" if row == "RECAP" else "[{:+.3f}, {:+.3f}]".format(*values["recap_minus_row"]["f1"])
        lines.append(
            f"| {row} | {value['precision']:.3f} | {value['recall']:.3f} | {value['f1']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {value['exact_set']:.3f} | {value['events_per_caption']:.2f} | {paired} |"
        )
    return lines


def format_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    accuracy, first = result["text_prompt_accuracy"], result["first_caption"]
    lines = [
        f"Fold {result['fold']}, {result['singles']['clips']} single clips, "
        "decoded with " + ", ".join(f"{name} {value}" for name, value in result["decoding"].items()),
        "",
        f"Text-prompt accuracy: eleven events that are no instruments {accuracy['not_instruments_macro']:.3f} macro, "
        f"{accuracy['not_instruments_micro']:.3f} micro; all 21 {accuracy['all_macro']:.3f} macro, "
        f"{accuracy['all_micro']:.3f} micro.",
        "Per event: " + ", ".join(f"{event} {value:.2f}" for event, value in accuracy["per_event"].items()) + ".",
        f"First retrieved caption: exact {first['exact']:.3f}, a superset {first['superset']:.3f}.",
        "",
        *_rows_as_text(result["singles"]),
    ]
    if "mixtures" in result:
        mixed = result["mixtures"]
        order = mixed["order"]
        lines += ["", f"{mixed['clips']} mixtures (list {mixed['hash']})", "", *_rows_as_text(mixed), ""]
        lines.append(
            f"RECAP's F1: overlapping {mixed['overlap']['f1']:.3f}, in sequence {mixed['sequence']['f1']:.3f}. Order: "
            f"both events named in {order['named_both']} sequences, order right in {order['share']:.3f} of these."
        )
        lines += ["", "| sounds that are none of the events | clips | false naming |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {v['clips']} | {v['false_naming']:.3f} |" for kind, v in result["no_events"].items()]
        lines += [
            "",
            "| single clips | precision | recall | F1 | text-prompt accuracy |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {kind} | {v['precision']:.3f} | {v['recall']:.3f} | {v['f1']:.3f} | {v['accuracy_all_micro']:.3f} |"
            for kind, v in result["degraded"].items()
        ]
    return "\n".join(lines)
