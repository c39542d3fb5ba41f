"""The processor: audio becomes features, retrieved captions become prompts, token ids become captions."""

from __future__ import annotations

import bisect
import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .configuration_recap import AUTO_MAP, RecapConfig, copy_remote_code, encoder_class, loading, push_arguments
from .feature_extraction_recap import RecapFeatureExtractor
from .index_recap import from_package
from .options_recap import PAPER_PROMPT, CaptionOptions, PromptTemplate
from .retrieval_recap import MANIFEST_NAME, CaptionDatastore

DATASTORE_FOLDER = "datastore"
# GPT-2 has 1,024 positions, a caption at most 60 tokens (official code) and its end token.
DEFAULT_MAX_PROMPT_TOKENS = 1024 - 61
DEFAULT_MAX_CAPTION_TOKENS = 60


class RecapProcessor(ProcessorMixin):
    r"""
    Everything between a recording and the model, and between the model and a caption.

    Args:
        feature_extractor ([`RecapFeatureExtractor`]): CLAP's log-mel features.
        tokenizer (`PreTrainedTokenizerBase`): the decoder's. Without a padding token it pads with its end token.
        clap_tokenizer (`PreTrainedTokenizerBase`): the CLAP text tower's, which embeds the datastore's captions.
        num_retrieved_captions (`int`, *optional*, defaults to 4): k, the number of captions in the prompt (Section 4).
        prompt_template, caption_separator, prompt_without_captions, target_prefix (`str`, *optional*):
            See [`PromptTemplate`]; they default to the paper's words (Section 3.1).
        max_prompt_tokens (`int`, *optional*, defaults to 963):
            Longest prompt. A longer one drops its farthest captions.
        retrieval_diversity (`float`, *optional*, defaults to 0), retrieval_score_threshold (`float`, *optional*):
            `diversity` and `score_threshold` of [`CaptionDatastore.search`]. Off by default.
        projection_temperature (`float`, *optional*): see [`Captioner.encode`]. Off by default.
        datastore ([`CaptionDatastore`], *optional*): may be set later: `processor.datastore = store`.

    Example:
        >>> inputs = processor(audio=clips, sampling_rate=48_000, return_tensors="pt")
        >>> encoding = model.encode_audio(**inputs)
        >>> prompts = processor.build_prompts(encoding.audio_embeds)
        >>> ids = model.generate(encoder_outputs=encoding, **prompts)
        >>> processor.batch_decode(ids, skip_special_tokens=True)
        ['a dog barks twice']
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        clap_tokenizer: Any,
        num_retrieved_captions: int = 4,
        prompt_template: str = PAPER_PROMPT.template,
        caption_separator: str = PAPER_PROMPT.separator,
        prompt_without_captions: str = PAPER_PROMPT.without_captions,
        target_prefix: str = PAPER_PROMPT.target_prefix,
        max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
        retrieval_diversity: float = 0.0,
        retrieval_score_threshold: float | None = None,
        projection_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        # Not a named argument: transformers would take it for a part of the processor and write it as JSON.
        datastore = kwargs.pop("datastore", None)
        if kwargs.pop("retrieval_score_drop", None) is not None:
            raise ValueError("`retrieval_score_drop` is now `retrieval_score_threshold`, the lowest cosine.")
        if tokenizer.pad_token_id is None:
            # In a copy: the caller's tokenizer stays as it is.
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.eos_token
        self.num_retrieved_captions = num_retrieved_captions
        self.prompt_template = prompt_template
        self.caption_separator = caption_separator
        self.prompt_without_captions = prompt_without_captions
        self.target_prefix = target_prefix
        self.max_prompt_tokens = max_prompt_tokens
        self.retrieval_diversity = retrieval_diversity
        self.retrieval_score_threshold = retrieval_score_threshold
        self.projection_temperature = projection_temperature
        super().__init__(feature_extractor, tokenizer, clap_tokenizer, **kwargs)
        self.prompt  # noqa: B018 (the template checks itself)
        self.retrieval_options  # noqa: B018 (and so do the options)
        self.datastore = datastore

    @classmethod
    def from_config(
        cls,
        config: RecapConfig,
        tokenizer: Any,
        clap_tokenizer: Any,
        datastore: CaptionDatastore | None = None,
        feature_extractor: RecapFeatureExtractor | None = None,
        **settings: Any,
    ) -> RecapProcessor:
        """The processor that belongs to a model of `config`: its windows and its position limit.

        Args:
            config ([`RecapConfig`]), tokenizer, clap_tokenizer, datastore: the parts.
            feature_extractor (*optional*): for a published CLAP `RecapFeatureExtractor.from_clap_pretrained(clap)`,
                since its configuration does not say which frequencies its mel covers. Default: 0 to 14 kHz.
            settings: `num_retrieved_captions`, `prompt_template` and the other settings of this class.
        """
        if feature_extractor is None:
            length = config.window_length_s
            feature_settings = encoder_class(config.clap).feature_settings(config.clap)
            feature_settings["max_length_s"] = int(length) if length % 1 == 0 else length
            feature_extractor = RecapFeatureExtractor(**feature_settings)
        longest = config.decoder.n_positions - config.prefix_places - DEFAULT_MAX_CAPTION_TOKENS - 1
        settings = {"max_prompt_tokens": longest, "datastore": datastore, **settings}
        return cls(feature_extractor, tokenizer, clap_tokenizer, **settings)

    @classmethod
    def from_clap_gpt2_pretrained(cls, clap: Any, decoder: Any, **settings: Any) -> RecapProcessor:
        """The processor of the model that [`RecapForConditionalGeneration.from_clap_gpt2_pretrained`] makes.

        Args:
            clap, decoder (`str` or path): Hub ids or folders of a CLAP and a GPT-2, with their tokenizers.
            settings: `datastore` and what else `from_config` takes.

        Raises:
            `OSError`: if there is no tokenizer. `ImportError`: where `recap_hf` is not installed.
        """
        stock = from_package("conversion.stock", "making a processor of a CLAP and a GPT-2")
        return stock.join_processors(cls, clap, decoder, **settings)

    @property
    def prompt(self) -> PromptTemplate:
        """The words around the retrieved captions."""
        return PromptTemplate.of(self)

    @property
    def retrieval_options(self) -> CaptionOptions:
        """The retrieval that the checkpoint chooses: k, diversity, score threshold."""
        names = ("retrieval_diversity", "retrieval_score_threshold", "projection_temperature")
        return CaptionOptions(k=self.num_retrieved_captions, **{name: getattr(self, name) for name in names})

    @property
    def datastore(self) -> CaptionDatastore | None:
        """The captions to retrieve from. Replace it to move the captioner to another domain."""
        return self._datastore

    @datastore.setter
    def datastore(self, datastore: CaptionDatastore | None) -> None:
        if datastore is not None and not (hasattr(datastore, "search") and hasattr(datastore, "check_encoder")):
            hint = "load one with CaptionDatastore.from_pretrained, or build one with CaptionDatastore.from_captions."
            raise TypeError(f"`datastore` must be a CaptionDatastore, got {type(datastore).__name__}: {hint}")
        self._datastore = datastore

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | Sequence[int] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Features of `audio` ([`RecapFeatureExtractor`]), or tokens of `text` for the decoder.

        Args:
            audio, sampling_rate, return_tensors, kwargs: see [`RecapFeatureExtractor.__call__`].
            text (`str` or `Sequence[str]`, *optional*): gives `input_ids` and `attention_mask`.

        Raises:
            `ValueError`: if neither is given, or both: `build_training_inputs` makes labels.
        """
        if (audio is None) == (text is None):
            found = "neither was" if audio is None else "both were"
            hint = "To train, encode the audio and call `processor.build_training_inputs(retrieved, captions)`."
            raise ValueError(f"Give `audio` or `text`, {found} given. {hint}")
        if text is not None:
            kwargs = {"padding": return_tensors is not None, **kwargs}
            return self.tokenizer(text, return_tensors=return_tensors, **kwargs)
        return self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "decoder_input_ids", "decoder_attention_mask"]

    def retrieve(
        self,
        audio_embeds: Any,
        k: int | None = None,
        exclude_clip_ids: Sequence[Any] | None = None,
        exclude_texts: Sequence[Sequence[str]] | None = None,
        datastore: CaptionDatastore | None = None,
        options: CaptionOptions | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The captions nearest to each clip; see [`CaptionDatastore.search`].

        Args:
            audio_embeds (array or tensor of shape `(batch_size, num_windows, dimension)`): from `encode_audio`.
            k (`int`, *optional*): captions for each clip; default: that of `options`.
            exclude_clip_ids, exclude_texts (*optional*): captions to leave out.
            datastore (*optional*): searched instead of the processor's. Without either there are no captions.
            options ([`CaptionOptions`], *optional*): what they do not set is the processor's choice.
        """
        datastore = self.datastore if datastore is None else datastore
        if datastore is None:
            return [[] for _ in range(len(audio_embeds))]
        chosen = self.retrieval_options.merged_with(options or CaptionOptions())
        return datastore.search(
            audio_embeds,
            chosen.k if k is None else k,
            exclude_clip_ids,
            exclude_texts,
            chosen.retrieval_diversity,
            chosen.retrieval_score_threshold,
        )

    def build_prompts(
        self,
        audio_embeds: Any = None,
        k: int | None = None,
        retrieved: Sequence[Sequence[dict[str, Any] | str]] | None = None,
        exclude_clip_ids: Sequence[Any] | None = None,
        exclude_texts: Sequence[Sequence[str]] | None = None,
    ) -> BatchFeature:
        """Retrieves captions and puts them into prompts, left-padded.

        Args:
            audio_embeds (`torch.Tensor` of shape `(batch_size, num_windows, dimension)` or `(batch_size, dimension)`):
                What `model.encode_audio` returned. Not needed with `retrieved`.
            k (`int`, *optional*): captions per prompt, default `num_retrieved_captions`; 0 retrieves nothing.
            retrieved (*optional*): captions to use instead, texts or results of [`retrieve`], most similar first.
            exclude_clip_ids, exclude_texts (*optional*): see [`CaptionDatastore.search`].

        Returns:
            `BatchFeature` with `decoder_input_ids` and `decoder_attention_mask` of shape `(batch_size, length)`,
            and `retrieved`, the captions that stand in the prompts.

        Raises:
            `ValueError`: if not even a prompt without captions fits `max_prompt_tokens`.
        """
        if retrieved is None:
            if audio_embeds is None:
                raise ValueError("Give `audio_embeds` to retrieve captions for, or `retrieved` captions.")
            retrieved = self.retrieve(audio_embeds, k, exclude_clip_ids, exclude_texts)
        prompts = [self._fit_prompt(hits) for hits in retrieved]
        device = getattr(audio_embeds, "device", None)
        ids, mask = self._pad([tokens for tokens, _ in prompts], device, left=True)
        used = [[hits[row] for row in rows] for hits, (_, rows) in zip(retrieved, prompts, strict=True)]
        return BatchFeature({"decoder_input_ids": ids, "decoder_attention_mask": mask, "retrieved": used})

    def build_training_inputs(
        self,
        retrieved: Sequence[Sequence[dict[str, Any] | str]],
        captions: Sequence[str],
        max_caption_tokens: int = DEFAULT_MAX_CAPTION_TOKENS,
    ) -> BatchFeature:
        """Prompts with their target captions, right-padded, and labels that count the captions alone.

        Args:
            retrieved: for each example the captions of its prompt, most similar first.
            captions (`Sequence[str]`): the targets; white space is folded, the end token is added.
            max_caption_tokens (`int`, *optional*, defaults to 60): longer targets are cut (official code).

        Returns:
            `BatchFeature` with `decoder_input_ids`, `decoder_attention_mask` and `labels`, all of shape
            `(batch_size, length)`; labels are -100 on prompt and padding.
        """
        prompts = [self._fit_prompt(hits)[0] for hits in retrieved]
        targets = [self.encode_caption(caption, max_caption_tokens) for caption in captions]
        ids, mask = self._pad([own + target for own, target in zip(prompts, targets, strict=True)], None, left=False)
        labels = ids.masked_fill(mask == 0, -100)
        for row, prompt in enumerate(prompts):
            labels[row, : len(prompt)] = -100
        return BatchFeature({"decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels})

    def encode_caption(self, caption: str, max_caption_tokens: int = DEFAULT_MAX_CAPTION_TOKENS) -> list[int]:
        """Token ids of a caption as it follows a prompt: `target_prefix` before it, the end token behind it."""
        target = self._encode(self.target_prefix + " ".join(caption.split()))[:max_caption_tokens]
        return [*target, self.tokenizer.eos_token_id]

    def _fit_prompt(self, hits: Sequence[dict[str, Any] | str]) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, and which captions it has: as many of the nearest ones as fit, without those that
        no prompt has room for."""
        captions = [hit if isinstance(hit, str) else hit["caption"] for hit in hits]
        tokens = self._encode(self.prompt.build(captions))
        if len(tokens) <= self.max_prompt_tokens:
            return tokens, list(range(len(captions)))
        empty, most = self._encode(self.prompt.build([])), self.max_prompt_tokens
        if len(empty) > most:
            found = f"has {len(empty)} tokens, more than `max_prompt_tokens`={most}"
            raise ValueError(f"A prompt without captions {found}.")

        def encoded(rows: Sequence[int]) -> list[int]:
            return self._encode(self.prompt.build([captions[row] for row in rows]))

        # A caption has at least one token: of thousands only the first can fit.
        rows = range(min(len(captions), self.max_prompt_tokens))
        rows = [row for row in rows if len(encoded([row])) <= self.max_prompt_tokens]
        # Every further caption makes the prompt longer.
        counts = range(1, len(rows) + 1)
        fits = bisect.bisect_right(counts, self.max_prompt_tokens, key=lambda count: len(encoded(rows[:count])))
        return encoded(rows[:fits]), rows[:fits]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pad(
        self, sequences: Sequence[Sequence[int]], device: Any, left: bool
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        side = "left" if left else "right"
        rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return ids.to(device), mask.to(device)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Captions out of generated sequences, without the prompts that they begin with."""
        options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": skip_special_tokens, **kwargs}
        return [self.prompt.strip(text) for text in self.tokenizer.batch_decode(sequences, **options)]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """The caption of one sequence, without the prompt."""
        return self.batch_decode([token_ids], skip_special_tokens=skip_special_tokens, **kwargs)[0]

    def check_model(self, model: Any, check_datastore: bool = True) -> None:
        """Refuses a model that this processor or its datastore does not belong to.

        Args:
            model ([`RecapForConditionalGeneration`]): the model.
            check_datastore (`bool`, *optional*, defaults to `True`): check the encoder of the datastore, too, in a
                pass of the text tower.

        Raises:
            `ValueError`: if tokenizer, windows, prompt length or datastore do not fit; the message names both values.
        """
        config, size, end = model.config, len(self.tokenizer), self.tokenizer.eos_token_id
        vocabulary, positions, prefix = config.decoder.vocab_size, config.decoder.n_positions, config.prefix_places
        length, prompt = self.feature_extractor.max_length_s, self.max_prompt_tokens
        problem = None
        if size > vocabulary:
            problem = f"The tokenizer has {size} tokens, the decoder's vocabulary {vocabulary}"
        elif end != config.eos_token_id:
            problem = f"The tokenizer's end token has the id {end}, the model's {config.eos_token_id}"
        elif length != config.window_length_s:
            problem = f"The feature extractor's windows have {length} s, the model's {config.window_length_s} s"
        elif prompt + prefix >= positions:
            room = f"{positions} positions for prompt and caption together" + f" (prefix: {prefix})" * bool(prefix)
            problem = f"`max_prompt_tokens` is {prompt}, but the decoder has {room}"
        if problem:
            raise ValueError(f"{problem}: processor and model do not belong together.")
        if check_datastore and self.datastore is not None:
            self.datastore.check_encoder(model.embed_fingerprint(self))

    def to_dict(self) -> dict[str, Any]:
        # The base class copies every attribute deeply: not the datastore, which may hold gigabytes.
        twin = copy.copy(self)
        del twin._datastore
        output = super(RecapProcessor, twin).to_dict()
        output["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoFeatureExtractor", "AutoProcessor")}
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers; datastore and code are saved, too, and nothing written names a path of this machine."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        copy_remote_code(folder)
        if self.datastore is not None:
            self.datastore.save_pretrained(folder / DATASTORE_FOLDER)
        else:
            # Of a processor that was saved here before: it would be loaded with this one.
            (folder / DATASTORE_FOLDER / MANIFEST_NAME).unlink(missing_ok=True)
        # AutoTokenizer asks for a config.json. In an offline cache it takes a missing file for a broken download.
        config = folder / "clap_tokenizer" / "config.json"
        if not config.exists():
            config.parent.mkdir(exist_ok=True)
            config.write_text("{}\n", encoding="utf-8")
        push = push_arguments(folder, kwargs) if push_to_hub else {}
        saved = super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:
            self.push_to_hub(**push)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> RecapProcessor:
        """As in transformers; `datastore=` replaces the datastore of the checkpoint."""
        datastore = kwargs.pop("datastore", None)
        with loading(pretrained_model_name_or_path, "processor_config.json or a tokenizer"):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        found = _find_datastore(pretrained_model_name_or_path, kwargs) if datastore is None else datastore
        processor.datastore = found
        return processor

    @classmethod
    def _load_tokenizer_from_pretrained(cls, name: str, folder: Any, subfolder: str = "", **kwargs: Any) -> Any:
        # transformers takes the decoder's tokenizer where CLAP's cannot be loaded.
        inside = subfolder if name == "tokenizer" else os.path.join(subfolder, name)
        return AutoTokenizer.from_pretrained(folder, subfolder=inside, **kwargs)


def _find_datastore(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> CaptionDatastore | None:
    """The datastore inside a checkpoint, or `None`."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    hub_kwargs = {name: kwargs[name] for name in names if name in kwargs}
    subfolder = os.path.join(kwargs.get("subfolder", ""), DATASTORE_FOLDER)
    options = {"subfolder": subfolder, "_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    if cached_file(str(name_or_path), MANIFEST_NAME, **options) is None:
        return None
    return CaptionDatastore.from_pretrained(name_or_path, subfolder=subfolder, repo_type="model", **hub_kwargs)


__all__ = ["RecapProcessor"]
