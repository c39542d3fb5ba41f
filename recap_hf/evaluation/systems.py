"""The captioner under evaluation and its baselines, all from one encoding of each batch."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.audio_recap import SILENCE_CAPTION, is_silent
from recap_hf.modeling.captioning_recap import Captioner, CaptionResult, load_pretrained
from recap_hf.modeling.configuration_recap import UNTRAINED
from recap_hf.modeling.options_recap import DECODING, NO_RERANKING, RERANKING, CaptionOptions
from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text
from recap_hf.tagging import Tagger
from recap_hf.training.tasks.bases import plain_gpt2

MAIN_SYSTEM = "recap"
# Name: description, printed under every table.
SYSTEMS: dict[str, str] = {
    MAIN_SYSTEM: "the captioner: retrieved captions in the prompt, with audio",
    "no_captions": "no caption in the prompt, with audio",
    "random_captions": "captions drawn at random from the datastore in the prompt, with audio",
    "no_audio": "retrieved captions in the prompt, the encoder's states all zero",
    "audio_only": "no prompt: the decoder starts from its end-of-text token, with audio",
    "first_retrieved": "the first retrieved caption, nothing generated",
    "untrained": "no cross-attention: CLAP chooses among retrieved captions and what the language model makes of them",
    "tag_template": "a sentence of the classes that the CLAP's classification head finds",
}
_PROMPT_SETTINGS = ["prompt_template", "caption_separator", "prompt_without_captions", "target_prefix"]
_PROMPT_SETTINGS += ["max_prompt_tokens"]
NEED_DATASTORE = ("random_captions", "first_retrieved", "untrained")
# Systems for a captioner without paired audio: only where they are named.
ASKED_FOR = ("untrained", "tag_template")
_EARLIER_NAMES = {"no_retrieval": "no_captions", "audio_hidden": "no_audio"}


class EncodingCache:
    """Encoded batches of clips, for several evaluations of the same recordings with the same CLAP.

    Args:
        limit: bytes of hidden states to keep; batches beyond it are encoded each time.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self.limit = limit
        self._kept: dict[tuple[str, str], Any] = {}

    def encode(self, clap: str, waveforms: Sequence[np.ndarray], make: Callable[[], Any]) -> Any:
        """The encoding of a batch, from `make` the first time; `clap` identifies the encoder."""
        digest = hashlib.blake2b(digest_size=16)
        for waveform in waveforms:
            digest.update(len(waveform).to_bytes(8, "little") + np.ascontiguousarray(waveform).tobytes())
        key = clap, digest.hexdigest()
        encoding = self._kept[key] if key in self._kept else make()
        used = sum(each.last_hidden_state.nbytes for each in {**self._kept, key: encoding}.values())
        if used <= self.limit:
            self._kept[key] = encoding
        return encoding


class Systems:
    """A captioner and its baselines.

    Args:
        captioner: the captioner; the baselines vary its encoding, its retrieved captions or its prompt.
        seed: of the random captions.
        exclude_references: never retrieve a caption that equals a reference of the clip.
        encodings: encoded batches that several captioners with one CLAP share; None keeps none.
    """

    def __init__(
        self, captioner: Captioner, seed: int = 0, exclude_references: bool = False, encodings: Any = None
    ) -> None:
        self.captioner, self.seed, self.exclude_references = captioner, seed, exclude_references
        self.encodings = encodings
        self._clap = _hash_weights(captioner.model.clap) if encodings else ""
        # Without audio there is nothing to rerank by.
        reranking = dict.fromkeys(CaptionOptions.names(RERANKING)) | {"rerank": NO_RERANKING}
        kept = captioner.options.to_dict() | reranking
        parts, given = (captioner.model, captioner.processor), captioner.generate_kwargs
        self._without_audio = Captioner(*parts, options=CaptionOptions(**kept), generate_kwargs=given)
        self._untrained: Captioner | None = None
        self._tagger: Tagger | None = None
        self.retrieval = captioner.processor.retrieval_options.merged_with(captioner.options)

    def check(self, systems: Sequence[str] | None) -> list[str]:
        """The systems to run: those that are named, or all that are possible with this captioner.

        Raises:
            ValueError: if one is unknown, or needs a datastore and there is none.
        """
        has_datastore = self.captioner.datastore is not None
        if systems is None:
            possible = [name for name in SYSTEMS if has_datastore or name not in NEED_DATASTORE]
            return [name for name in possible if name not in ASKED_FOR]
        for name in systems:
            if name in _EARLIER_NAMES:
                raise ValueError(f"the system {name} is now called {_EARLIER_NAMES[name]}")
            if name not in SYSTEMS:
                raise ValueError(f"unknown system {name!r}: expected some of {', '.join(SYSTEMS)}")
            if name in NEED_DATASTORE and not has_datastore:
                raise ValueError(f"the system {name} needs a datastore, and the captioner has none (--datastore)")
        if "tag_template" in systems:
            self._tagger = Tagger(self.captioner.model.clap, self.captioner.processor.feature_extractor)
        return list(dict.fromkeys(systems))

    def caption(
        self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str], references: Sequence, systems: Sequence[str]
    ) -> dict[str, list[CaptionResult]]:
        """Captions of one batch by each system.

        Args:
            waveforms: mono, at the captioner's sampling rate. A silent one is captioned as silence by every system.
            clip_ids: captions of these clips in the datastore are left out, each for its own clip.
            references: used only with `exclude_references`.
            systems: some of `SYSTEMS`.
        """
        results = {name: [CaptionResult(SILENCE_CAPTION, 1.0, []) for _ in waveforms] for name in systems}
        rows = [row for row, waveform in enumerate(waveforms) if not is_silent(waveform)]
        if not rows:
            return results
        sounding, ids = [waveforms[row] for row in rows], [clip_ids[row] for row in rows]
        texts = [references[row] for row in rows] if self.exclude_references else None
        excluded = {"exclude_clip_ids": ids, "exclude_texts": texts}
        encode = partial(self.captioner.encode, sounding, **excluded)
        # States that were projected onto one captioner's datastore are not another's.
        shared = self.encodings and not self.retrieval.projection_temperature
        encoding = self.encodings.encode(self._clap, sounding, encode) if shared else encode()
        given = {"datastore": self.captioner.datastore, "options": self.captioner.options}
        retrieved = self.captioner.processor.retrieve(encoding.audio_embeds, **given, **excluded)
        for name in systems:
            if name == "tag_template":
                found = [self._tag_sentence(waveform) for waveform in sounding]
            else:
                found = self._caption_as(name, encoding, retrieved, ids)
            for row, result in zip(rows, found, strict=True):
                results[name][row] = result
        return results

    def _caption_as(self, name: str, encoding: Any, retrieved: list[list[dict]], clip_ids: list[str]) -> list[Any]:
        nothing: list[list[dict[str, Any]]] = [[] for _ in clip_ids]
        if name == "first_retrieved":
            first = [(hits or [{"caption": "", "score": 0.0}])[0] for hits in retrieved]
            pairs = zip(first, retrieved, strict=True)
            return [CaptionResult(hit["caption"], hit["score"], hits) for hit, hits in pairs]
        if name == "untrained":
            return self._assembly().generate(encoding, retrieved)
        if name == "random_captions":
            retrieved = [self._random_captions(clip_id) for clip_id in clip_ids]
        if name == "no_audio":
            # As training without audio has them.
            silent = {**encoding, "last_hidden_state": torch.zeros_like(encoding.last_hidden_state)}
            return self._without_audio.generate(type(encoding)(**silent), retrieved)
        if name == "audio_only":
            model = self.captioner.model
            start = torch.full((len(clip_ids), 1), model.config.eos_token_id, device=model.device)
            prompts = {"decoder_input_ids": start, "decoder_attention_mask": torch.ones_like(start)}
            return self.captioner.decode(encoding, prompts, nothing)
        if name == "no_captions":
            return self.captioner.with_options(CaptionOptions(k=0)).generate(encoding, nothing)
        return self.captioner.generate(encoding, retrieved)

    def _assembly(self) -> Captioner:
        """The captioner's CLAP and language model as `recap assemble` puts them together."""
        if self._untrained is None:
            captioner = self.captioner
            parts = (captioner.model.clap, plain_gpt2(captioner.model))
            model = type(captioner.model).from_clap_gpt2_pretrained(*parts, conditioning=UNTRAINED)
            model.generation_config = captioner.model.generation_config
            decoding = CaptionOptions(rerank="clap", num_beams=4, rerank_weight=inf, copy_margin=0)
            options = captioner.options.merged_with(decoding)
            given = (model.to(captioner.model.device), captioner.processor, captioner.datastore, options)
            self._untrained = Captioner(*given)
        return self._untrained

    def _tag_sentence(self, waveform: np.ndarray) -> CaptionResult:
        """The names of up to three classes, each to its first comma, in a sentence."""
        [tags] = self._tagger.tag([waveform], top=3)
        names = [tag.name.partition(",")[0].lower() for tag in tags]
        score = tags[0].probability if tags else 0.0
        return CaptionResult(f"The sound of {' and '.join(names) or 'something'}", score, [])

    def _random_captions(self, clip_id: str) -> list[dict[str, Any]]:
        """k different captions of other clips, the same for a clip in every run with this seed."""
        datastore, k = self.captioner.datastore, self.retrieval.k
        digest = hashlib.sha256(f"{self.seed}:{clip_id}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        own = normalize_clip_id(clip_id)
        drawn: dict[str, dict[str, Any]] = {}
        # More than k rows are drawn, since own captions and repeated texts do not count.
        for row in generator.choice(len(datastore), size=min(len(datastore), 20 * k), replace=False):
            record = datastore.records[int(row)]
            if record.get("clip_id") is None or normalize_clip_id(record["clip_id"]) != own:
                drawn.setdefault(normalize_text(record["caption"]), {**record, "row": int(row)})
            if len(drawn) == k:
                break
        return list(drawn.values())

    def describe(self) -> dict[str, Any]:
        """What decides the captions, as plain JSON values: options, and hashes of the weights and the datastore."""
        captioner, datastore = self.captioner, self.captioner.datastore
        config = captioner.generation_config()
        # Every option: where none is given, the choice of the checkpoint.
        options = {name: getattr(self.retrieval, name) for name in CaptionOptions.names()}
        for name in CaptionOptions.names(DECODING, RERANKING):
            options[name] = getattr(config, name, None) if options[name] is None else options[name]
            # JSON has no infinity.
            options[name] = "inf" if options[name] == float("inf") else options[name]
        return {
            "weights_sha256": _hash_weights(captioner.model),
            "dtype": str(captioner.model.dtype).removeprefix("torch."),
            "options": options,
            "prompt": {name: getattr(captioner.processor, name) for name in _PROMPT_SETTINGS},
            "seed": self.seed,
            "exclude_references": self.exclude_references,
            "conditioning": captioner.model.config.conditioning,
            "datastore": None if datastore is None else _describe_datastore(datastore),
        }


def _describe_datastore(datastore: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in datastore.captions:
        digest.update(text.encode("utf-8", errors="replace") + b"\n")
    index = (datastore.index or {"kind": "exact"})["kind"]
    return {"captions": len(datastore), "keys": datastore.keys, "index": index, "sha256": digest.hexdigest()}


def load_captioner(model: str | None = None, datastore: Any = None, options: Any = None, **loading: Any) -> Captioner:
    """[`Captioner.from_pretrained`], where `datastore="none"` gives a captioner without a datastore."""
    loaded, processor = load_pretrained(model, **loading)
    if datastore == "none":
        processor.datastore = datastore = None
    return Captioner(loaded, processor, datastore, options)


def _hash_weights(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
