"""The sounds in a recording, with probabilities and times, by the audio tower of a CLAP."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from recap_hf.assets import default_model_path
from recap_hf.audio.windows import WINDOWS_TOGETHER, UnreadableError, sound_windows, sounding_parts, window_features
from recap_hf.modeling.captioning_recap import chosen_device
from recap_hf.training.tasks.bases import load_clap

# Patches whose embedding is compared with labels, for the times: 1.44 s of a MobileNet, the whole window of an HTSAT.
_PATCHES_OF_A_PART = 3


CATEGORIES = ("audioset", "ucs")


def tag_categories(scheme: str) -> dict[str, dict[str, str]]:
    """The categories of the default's classes.

    Args:
        scheme (`str`): `"audioset"`, the seven roots of AudioSet's ontology, or `"ucs"`, the Universal Category System
            of sound designers (version 8.2.1). The mapping is this package's own.

    Returns:
        `dict`: for each class `{"category"}`, with `"ucs"` `{"category", "catid"}`, such as `{"category":
        "ANIMALS-DOG", "catid": "ANMLDog"}`. Classes without a place in UCS, such as "Echo", are missing.

    Raises:
        `ValueError`: for another scheme.
    """
    if scheme not in CATEGORIES:
        raise ValueError(f"`scheme` must be one of {', '.join(CATEGORIES)}, got {scheme!r}.")
    with open(default_model_path().with_name("tag_categories.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if scheme == "audioset":
        return {row["class"]: {"category": row["audioset"]} for row in rows}
    named = {row["class"]: (f"{row['ucs_category']}-{row['ucs_subcategory']}", row["ucs_catid"]) for row in rows}
    return {name: {"category": category, "catid": catid} for name, (category, catid) in named.items() if catid}


@dataclass(frozen=True)
class Tag:
    """A sound in a recording.

    Args:
        name (`str`): the class or the label.
        probability (`float`): that the recording has it; of labels they sum to 1.
        times (`list[tuple[float, float]]`): start and end in seconds of the parts of the recording whose probability
            reaches the threshold, in order.
    """

    name: str
    probability: float
    times: list[tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


class Tagger:
    """Tags recordings with the classes of a CLAP's classification head, or with labels of your own.

    Without labels the probability of a class is the mean of its mean and its maximum over the patches of the
    recording. With labels it is a softmax over all of them, of the cosines of recording and prompt times the CLAP's
    logit scale, as in transformers' `zero-shot-audio-classification`.

    Args:
        clap (`nn.Module`): an encoder class, such as [`MobileNetClapModel`]; used in evaluation mode.
        feature_extractor ([`RecapFeatureExtractor`]): the CLAP's.
        tokenizer (*optional*): of its text tower; needed with labels.
        labels (`Sequence[str]`, *optional*): at least two.
        template (`str`, *optional*, defaults to `"{}"`): the prompt around each label.

    Raises:
        `ValueError`: for a CLAP that can tell neither classes nor labels, fewer than two labels, or a template without
            `{}`.

    Example:
        >>> tagger = Tagger.from_pretrained("yamnet")
        >>> [tags] = tagger.tag(["dog.wav"])
        >>> tags[0]
        Tag(name='Dog', probability=0.93, times=[(0.0, 1.92)])
    """

    def __init__(
        self, clap: Any, feature_extractor: Any, tokenizer: Any = None, labels: Any = None, template: str = "{}"
    ) -> None:
        self.clap, self.feature_extractor = clap.eval(), feature_extractor
        self._texts: torch.Tensor | None = None
        if labels is None:
            if not hasattr(clap, "classify_features"):
                hint = "give labels (--labels FILE), or a CLAP that has one (MobileNetClapModel)."
                raise ValueError(f"A {type(clap).__name__} has no classification head: {hint}")
            self.names = [clap.config.id2label[number] for number in range(clap.config.num_labels)]
            return
        self.names = list(dict.fromkeys(labels))
        if len(self.names) < 2:
            raise ValueError(f"Probabilities are shared among the labels: expected at least 2, got {len(self.names)}.")
        if "{}" not in template:
            raise ValueError(f"The template must hold {{}}, the place of the label, got {template!r}.")
        if tokenizer is None:
            raise ValueError("Labels are embedded by the text tower, which needs its `tokenizer`; got None.")
        prompts = [template.replace("{}", name) for name in self.names]
        texts = torch.from_numpy(clap.embed_captions(prompts, tokenizer)).to(clap.logit_scale_a.device)
        self._texts = texts * clap.logit_scale_a.detach().float().exp()

    @classmethod
    def from_pretrained(
        cls, name_or_path: Any = None, *, device: Any = None, labels: Sequence | None = None, template: str = "{}"
    ) -> "Tagger":
        """Loads a CLAP.

        Args:
            name_or_path (`str` or path, *optional*): folder or Hub id of a RECAP checkpoint or of a CLAP; default: the
                checkpoint in the package.
            device (*optional*): of torch; default: a GPU where there is one, else the CPU.
            labels, template: see [`Tagger`].

        Raises:
            `OSError`: if there is no such model. `ValueError`: if it cannot tag.
        """
        name = "embedded" if name_or_path is None else os.fspath(name_or_path)
        clap, tokenizer, extractor = load_clap(name, with_texts=labels is not None)
        return cls(clap.to(chosen_device(device)), extractor, tokenizer, labels, template)

    def tag(self, recordings: Iterable[Any], top: int | None = 10, threshold: float = 0.1) -> list[list[Tag]]:
        """The tags of recordings, most probable first.

        Args:
            recordings (`Iterable`): what [`AudioStream`] takes: paths, URLs, bytes, or waveforms at the feature
                extractor's rate. They are read block by block: memory does not grow with their length.
            top (`int`, *optional*, defaults to 10): tags of a recording at the most; `None`: all.
            threshold (`float`, *optional*, defaults to 0.1): smallest probability of a tag, and of the parts of the
                recording that are its `times`.

        Returns:
            `list[list[Tag]]`: one list for each recording, empty for silence.

        Raises:
            What [`AudioStream`] raises for a recording that cannot be read.
        """
        found = []
        for _, result in self.tag_stream(recordings, top, threshold):
            if isinstance(result, Exception):
                raise result
            found.append(result)
        return found

    def tag_stream(
        self, recordings: Iterable[Any], top: int | None = 10, threshold: float = 0.1
    ) -> Iterator[tuple[Any, list[Tag] | Exception]]:
        """As `tag`, one recording after the other; one that cannot be read stops no other.

        Yields:
            `tuple`: each recording, and its tags or the exception that reading it raised.
        """
        for recording in recordings:
            try:
                result: Any = self._tag(recording, top, threshold)
            except UnreadableError as error:
                result = error.__cause__
            yield recording, result

    @torch.no_grad()
    def _tag(self, recording: Any, top: int | None, threshold: float) -> list[Tag]:
        total = highest = embeds = np.zeros(1)
        count, runs = 0, [[] for _ in self.names]
        windows = sound_windows(recording, self.feature_extractor)
        while batch := list(islice(windows, WINDOWS_TOGETHER)):
            features = window_features(self.clap, self.feature_extractor, batch)
            if self._texts is None:
                scores = self.clap.classify_features(features)
            else:
                embeds = embeds + self.clap.embed_features(features).sum(dim=0).double().cpu().numpy()
                parts = [self.clap.embed_features(part) for part in features.split(_PATCHES_OF_A_PART, dim=1)]
                scores = self._label_probabilities(torch.stack(parts, dim=1))
            spans, kept = sounding_parts(self.feature_extractor, batch, features, scores.shape[1])
            scores = scores.cpu().numpy()[kept]
            total, count = total + scores.sum(axis=0, dtype=np.float64), count + len(scores)
            highest = np.maximum(highest, scores.max(axis=0, initial=0.0))
            for part, number in np.argwhere(scores >= threshold):
                _extend(runs[number], *spans[part])
        if not count:
            return []
        if self._texts is None:
            # As `clip_scores`, which needs all patches at once.
            probabilities = (total / count + highest) / 2
        else:
            clip = normalize(torch.from_numpy(embeds).to(self._texts), dim=0)
            probabilities = self._label_probabilities(clip).cpu().numpy()
        order = np.argsort(-probabilities, kind="stable")[:top]
        named = [(self.names[number], float(probabilities[number]), runs[number]) for number in order]
        return [Tag(*one) for one in named if one[1] >= threshold]

    def _label_probabilities(self, embeds: torch.Tensor) -> torch.Tensor:
        return (embeds @ self._texts.T).softmax(dim=-1)


def _extend(run: list[tuple[float, float]], begin: float, end: float) -> None:
    """Adds a span of time, which lengthens the last one where they meet."""
    if run and begin <= run[-1][1]:
        begin = run.pop()[0]
    run.append((begin, end))
