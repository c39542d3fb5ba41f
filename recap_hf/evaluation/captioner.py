"""One batch of clips through the captioner and, from the same encoding, through its dull baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# name: what it is, as it stands under every table
SYSTEMS: dict[str, str] = {
    "recap": "the captioner: retrieved captions in the prompt, audio heard",
    "no_retrieval": "no caption in the prompt, audio heard",
    "random_captions": "captions drawn at random from the datastore in the prompt, audio heard",
    "audio_hidden": "retrieved captions in the prompt, the encoder's states all zero",
    "audio_only": "no prompt at all: the decoder starts from its end-of-text token, audio heard",
    "first_retrieved": "the first retrieved caption as the answer, nothing generated",
}
NEED_DATASTORE = ("random_captions", "first_retrieved")


@dataclass(frozen=True)
class Prediction:
    """What a system says about a clip.

    `score` is the exponential of the mean token log-probability (for `first_retrieved` the cosine similarity), and
    `retrieved` are the captions that stood in the prompt.
    """

    caption: str
    score: float
    retrieved: list[dict[str, Any]]


class EncodingCache:
    """Encoded batches of clips, for several evaluations of the same recordings with the same CLAP.

    Args:
        limit: bytes of hidden states to keep; further batches are encoded each time.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit = limit
        self._used = 0
        self._kept: dict[tuple[str, str], Any] = {}

    def encode(self, clap: str, waveforms: Sequence[np.ndarray], make: Callable[[], Any]) -> Any:
        """The encoding of a batch, from `make` the first time; `clap` tells one encoder from another."""
        digest = hashlib.blake2b(digest_size=16)
        for waveform in waveforms:
            digest.update(len(waveform).to_bytes(8, "little") + np.ascontiguousarray(waveform).tobytes())
        key = clap, digest.hexdigest()
        if key not in self._kept:
            encoding = make()
            size = encoding.last_hidden_state.nbytes
            if self._used + size > self.limit:
                return encoding
            self._kept[key] = encoding
            self._used += size
        return self._kept[key]


@dataclass
class Captioner:
    """A model with its processor, and how to run them.

    Args:
        model, processor: a RECAP captioner; the processor's datastore is what it retrieves from.
        k: captions in the prompt; None: the processor's.
        generation: arguments of `generate`, such as `num_beams`, and of [`Choice`], in the place of the checkpoint's
            own. The weights of other readings are for what has a prompt.
        seed: of the random captions.
        exclude_references: never retrieve a caption that equals a reference of the clip.
        encodings: encoded batches that several captioners of one CLAP share; None keeps none.
    """

    model: Any
    processor: Any
    k: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    exclude_references: bool = False
    encodings: EncodingCache | None = None

    def __post_init__(self) -> None:
        self._clap = _hash_weights(self.model.clap) if self.encodings else ""
        if self.k is None:
            self.k = self.processor.num_retrieved_captions
        self.processor.check_model(self.model)

    def caption(
        self,
        waveforms: Sequence[np.ndarray],
        clip_ids: Sequence[str],
        references: Sequence[Sequence[str]],
        systems: Sequence[str],
    ) -> dict[str, list[Prediction]]:
        """Captions of one batch by each system.

        Args:
            waveforms: mono, at the feature extractor's rate. A silent one is captioned as silence by every system.
            clip_ids: captions of these clips in the datastore are left out, each for its own clip.
            references: used only with `exclude_references`.
            systems: some of `SYSTEMS`.
        """
        from recap_hf.modeling.audio_recap import is_silent
        from recap_hf.modeling.pipeline_recap import SILENCE_CAPTION

        heard = [number for number, waveform in enumerate(waveforms) if not is_silent(waveform)]
        results = {name: [Prediction(SILENCE_CAPTION, 1.0, []) for _ in waveforms] for name in systems}
        if not heard:
            return results
        texts = [references[number] for number in heard] if self.exclude_references else None
        found = self._caption_heard(
            [waveforms[number] for number in heard], [clip_ids[number] for number in heard], texts, systems
        )
        for name, predictions in found.items():
            for number, prediction in zip(heard, predictions, strict=True):
                results[name][number] = prediction
        return results

    def _caption_heard(
        self,
        waveforms: list[np.ndarray],
        clip_ids: list[str],
        excluded_texts: list[Sequence[str]] | None,
        systems: Sequence[str],
    ) -> dict[str, list[Prediction]]:
        encoding = self._encode(waveforms)
        retrieved = self.processor.retrieve(
            encoding.audio_embeds, self.k, exclude_clip_ids=clip_ids, exclude_texts=excluded_texts
        )
        nothing: list[list[dict[str, Any]]] = [[] for _ in clip_ids]
        results = {}
        for name in systems:
            if name == "first_retrieved":
                results[name] = [_first(hits) for hits in retrieved]
            elif name == "random_captions":
                results[name] = self._generate(encoding, [self._random_captions(clip_id) for clip_id in clip_ids])
            elif name == "audio_hidden":
                results[name] = self._generate(_without_audio(encoding), retrieved, listens=False)
            elif name == "audio_only":
                results[name] = self._generate(encoding, nothing, prompted=False)
            else:
                results[name] = self._generate(encoding, retrieved if name == "recap" else nothing)
        return results

    def _encode(self, waveforms: list[np.ndarray]) -> Any:
        import torch

        def make() -> Any:
            rate, device = self.processor.feature_extractor.sampling_rate, str(self.model.device)
            with torch.no_grad():
                inputs = self.processor(audio=waveforms, sampling_rate=rate, return_tensors="pt", device=device)
                return self.model.encode_audio(**inputs)

        return self.encodings.encode(self._clap, waveforms, make) if self.encodings else make()

    def _generate(
        self, encoding: Any, retrieved: list[list[dict[str, Any]]], prompted: bool = True, listens: bool = True
    ) -> list[Prediction]:
        import torch

        from recap_hf.modeling.captioning_recap import Captioner
        from recap_hf.modeling.options_recap import CaptionOptions

        known = {name: value for name, value in self.generation.items() if name in CaptionOptions.names()}
        others = {name: value for name, value in self.generation.items() if name not in known}
        if not listens:
            known = {name: known[name] for name in known if name not in ("rerank", "candidates", "rerank_weight")}
            known["rerank"] = "none"
        captioner = Captioner(self.model, self.processor, options=CaptionOptions(**known), generate_kwargs=others)
        if prompted:
            prompts = self.processor.build_prompts(encoding.audio_embeds, retrieved=retrieved)
            retrieved = prompts.pop("retrieved")
        else:
            start = torch.full((len(retrieved), 1), self.model.config.eos_token_id, device=self.model.device)
            prompts = {"decoder_input_ids": start, "decoder_attention_mask": torch.ones_like(start)}
        found = captioner.decode(encoding, prompts, retrieved)
        return [Prediction(result.caption, result.score, result.retrieved) for result in found]

    def _random_captions(self, clip_id: str) -> list[dict[str, Any]]:
        """k different captions of other clips, the same for a clip in every run with this seed."""
        from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text

        store = self.processor.datastore
        digest = hashlib.sha256(f"{self.seed}:{clip_id}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        own = normalize_clip_id(clip_id)
        drawn: dict[str, dict[str, Any]] = {}
        # A few more than k are looked at, since own captions and repeated texts do not count.
        for row in generator.choice(len(store), size=min(len(store), 20 * self.k), replace=False):
            record = store.records[int(row)]
            if record.get("clip_id") is None or normalize_clip_id(record["clip_id"]) != own:
                drawn.setdefault(normalize_text(record["caption"]), {**record, "row": int(row)})
            if len(drawn) == self.k:
                break
        return list(drawn.values())


def _first(hits: list[dict[str, Any]]) -> Prediction:
    return Prediction(hits[0]["caption"], hits[0]["score"], hits) if hits else Prediction("", 0.0, [])


def _without_audio(encoding: Any) -> Any:
    """`encoding` with its hidden states at zero: what training calls hidden audio."""
    import torch

    return type(encoding)(**{**encoding, "last_hidden_state": torch.zeros_like(encoding.last_hidden_state)})


def load_captioner(
    model: str | None = None,
    datastore: Any = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> Captioner:
    """A captioner from a checkpoint.

    Args:
        model: folder or Hub id; None: the embedded default.
        datastore: what `open_datastore` takes, "none" for no retrieval, None for the checkpoint's own.
        device: torch device; None: a GPU where there is one.
        dtype: `float32`, `bfloat16` or `float16`; None: the checkpoint's.
        **settings: of `Captioner`.

    Raises:
        OSError: if the checkpoint is not there.
        ValueError: if checkpoint and datastore do not belong together.
    """
    from recap_hf import open_datastore
    from recap_hf.modeling.captioning_recap import load_pretrained

    loaded, processor = load_pretrained(model, device, dtype)
    if datastore == "none":
        processor.datastore = None
    elif datastore is not None:
        processor.datastore = open_datastore(datastore, loaded, processor)
    return Captioner(loaded, processor, **settings)


def describe_captioner(captioner: Captioner) -> dict[str, Any]:
    """What decides the captions: settings, and hashes of the weights and of the datastore's captions."""
    store = captioner.processor.datastore
    return {
        "weights_sha256": _hash_weights(captioner.model),
        "dtype": str(captioner.model.dtype).removeprefix("torch."),
        "num_retrieved": captioner.k,
        "prompt_template": captioner.processor.prompt_template,
        "generation": {**_decoding(captioner.model.generation_config), **captioner.generation},
        "seed": captioner.seed,
        "exclude_references": captioner.exclude_references,
        "conditioning": captioner.model.config.conditioning,
        "datastore": None
        if store is None
        else {
            "captions": len(store),
            "keys": store.keys,
            "index": (store.index or {"kind": "exact"})["kind"],
            "sha256": _hash_captions(store.captions),
        },
    }


def _decoding(config: Any) -> dict[str, Any]:
    own = ("rerank", "candidates", "rerank_weight")
    settings = {name: getattr(config, name) for name in ("num_beams", "max_new_tokens", "length_penalty", "do_sample")}
    return settings | {name: getattr(config, name) for name in own if getattr(config, name, None) is not None}


def _hash_weights(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    weights: Mapping[str, Any] = model.state_dict()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_captions(captions: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for caption in captions:
        digest.update(caption.encode("utf-8", errors="replace") + b"\n")
    return digest.hexdigest()
