"""The processor: audio becomes features, retrieved captions become prompts, token ids become captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from .configuration_recap import RecapConfig
from .datastore_choice_recap import check_choice
from .feature_extraction_recap import RecapFeatureExtractor
from .hub_recap import DATASTORE_FOLDER, HubPushMixin, loading_errors, take_push_options
from .prompt_recap import PAPER_PROMPT, PromptTemplate
from .retrieval_recap import CaptionDatastore
from .travelling_recap import AUTO_MAP, complete_tokenizer_folder, copy_travelling_files

# GPT-2 has 1,024 positions, a caption at most 60 tokens (official code) and its end token.
DEFAULT_MAX_PROMPT_TOKENS = 1024 - 61
DEFAULT_MAX_CAPTION_TOKENS = 60


class RecapProcessor(HubPushMixin, ProcessorMixin):
    r"""
    Everything between a recording and the model, and between the model and a caption.

    Args:
        feature_extractor ([`RecapFeatureExtractor`]): CLAP's log-mel features.
        tokenizer (`PreTrainedTokenizerBase`): the decoder's. Without a padding token it pads with its end token.
        clap_tokenizer (`PreTrainedTokenizerBase`): the CLAP text tower's, which embeds the datastore's captions.
        num_retrieved_captions (`int`, *optional*, defaults to 4): k of the prompt.
        prompt_template, caption_separator, prompt_without_captions, target_prefix (`str`, *optional*):
            See [`PromptTemplate`]; they default to the paper's words (Section 3.1).
        max_prompt_tokens (`int`, *optional*, defaults to 963):
            Longest prompt. A longer one drops its farthest captions.
        retrieval_diversity (`float`, *optional*, defaults to 0), retrieval_score_drop (`float`, *optional*):
            Captions that differ from each other, and none that scores much less than the best: `diversity` and
            `score_drop` of [`CaptionDatastore.search`]. Off by default; may be set later, and are saved.
        datastore ([`CaptionDatastore`], *optional*): may be set later: `processor.datastore = store`.

    Example:
        >>> inputs = processor(audio=clips, sampling_rate=48_000, return_tensors="pt")
        >>> encoding = model.encode_audio(**inputs)
        >>> prompts = processor.build_prompts(encoding.audio_embeds)
        >>> ids = model.generate(encoder_outputs=encoding, **prompts)
        >>> processor.batch_decode(ids, skip_special_tokens=True)
        ['a dog barks twice']
    """

    hub_name = "RECAP processor"
    hub_files = (f"{DATASTORE_FOLDER}/*", "*_recap.py")

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
        retrieval_score_drop: float | None = None,
        **kwargs: Any,
    ) -> None:
        # Not a named argument: transformers would take it for a part of the processor and write it as JSON.
        datastore = kwargs.pop("datastore", None)
        self._datastore: CaptionDatastore | None = None
        self._own_datastore: CaptionDatastore | None = None
        self._checked: tuple[int, int] | None = None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.num_retrieved_captions = num_retrieved_captions
        self.prompt_template = prompt_template
        self.caption_separator = caption_separator
        self.prompt_without_captions = prompt_without_captions
        self.target_prefix = target_prefix
        self.max_prompt_tokens = max_prompt_tokens
        self.retrieval_diversity = retrieval_diversity
        self.retrieval_score_drop = retrieval_score_drop
        super().__init__(feature_extractor, tokenizer, clap_tokenizer)
        self.prompt  # noqa: B018 (the template checks itself)
        check_choice(retrieval_diversity, retrieval_score_drop, "retrieval_")
        self.datastore = datastore

    @classmethod
    def from_config(
        cls,
        config: RecapConfig,
        tokenizer: Any,
        clap_tokenizer: Any,
        datastore: CaptionDatastore | None = None,
        feature_extractor: RecapFeatureExtractor | None = None,
    ) -> RecapProcessor:
        """The processor that belongs to a model of `config`: its prompt, its k, its windows, its position limit.

        The configuration of a CLAP does not say which frequencies its mel covers: for a published one pass
        `feature_extractor=RecapFeatureExtractor.from_clap_pretrained(clap)`. Default: `ClapFeatureExtractor`'s
        settings, 0 to 14 kHz.
        """
        if feature_extractor is None:
            length = config.window_length_s
            feature_extractor = RecapFeatureExtractor(
                truncation="fusion" if config.clap.audio_config.enable_fusion else "rand_trunc",
                feature_size=config.clap.audio_config.num_mel_bins,
                max_length_s=int(length) if length % 1 == 0 else length,
            )
        return cls(
            feature_extractor,
            tokenizer,
            clap_tokenizer,
            num_retrieved_captions=config.num_retrieved_captions,
            retrieval_diversity=config.retrieval_diversity,
            retrieval_score_drop=config.retrieval_score_drop,
            prompt_template=config.prompt_template,
            caption_separator=config.caption_separator,
            prompt_without_captions=config.prompt_without_captions,
            target_prefix=config.target_prefix,
            max_prompt_tokens=config.decoder.n_positions - config.prefix_places - DEFAULT_MAX_CAPTION_TOKENS - 1,
            datastore=datastore,
        )

    @property
    def prompt(self) -> PromptTemplate:
        """The words around the retrieved captions."""
        return PromptTemplate.of(self)

    @property
    def datastore(self) -> CaptionDatastore | None:
        """The captions to retrieve from. Replace it to move the captioner to another domain."""
        return self._datastore

    @datastore.setter
    def datastore(self, datastore: CaptionDatastore | None) -> None:
        # By name: the class exists once more where the code has travelled with a checkpoint.
        names = {each.__name__ for each in type(datastore).__mro__}
        if datastore is not None and CaptionDatastore.__name__ not in names:
            raise TypeError(
                f"`datastore` must be a CaptionDatastore, got {type(datastore).__name__}. Build one with "
                "CaptionDatastore.from_captions or load one with CaptionDatastore.from_pretrained."
            )
        self._datastore = datastore
        self._checked = None

    @property
    def has_own_datastore(self) -> bool:
        """Whether the captions are those that came with the checkpoint, and not others in their place."""
        return self._datastore is not None and self._datastore is self._own_datastore

    # -------------------------------------------------------------- audio in

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
            `ValueError`: if neither is given, or both: labels stand behind a prompt, whose captions are retrieved by
                what the encoder makes of the audio; `build_training_inputs` makes them.
        """
        if (audio is None) == (text is None):
            found = "neither was" if audio is None else "both were"
            raise ValueError(
                f"Give `audio` or `text`, {found} given. Captions to train on follow a prompt of retrieved captions: "
                "encode the audio, then `processor.build_training_inputs(retrieved, captions)`."
            )
        if text is not None:
            return self.tokenizer(text, return_tensors=return_tensors, padding=return_tensors is not None)
        return self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "decoder_input_ids", "decoder_attention_mask"]

    # --------------------------------------------------------------- prompts

    def retrieve(
        self,
        audio_embeds: Any,
        k: int | None = None,
        exclude_clip_ids: Sequence[Any] | None = None,
        exclude_texts: Sequence[Sequence[str]] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The captions nearest to each clip; see [`CaptionDatastore.search`]. Without a datastore there are none."""
        k = self.num_retrieved_captions if k is None else k
        if self.datastore is None:
            return [[] for _ in range(len(audio_embeds))]
        return self.datastore.search(
            audio_embeds, k, exclude_clip_ids, exclude_texts, self.retrieval_diversity, self.retrieval_score_drop
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
        return BatchFeature(
            {
                "decoder_input_ids": ids,
                "decoder_attention_mask": mask,
                "retrieved": [list(hits)[:count] for hits, (_, count) in zip(retrieved, prompts, strict=True)],
            }
        )

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
        sequences, labels = [], []
        for hits, caption in zip(retrieved, captions, strict=True):
            prompt, _ = self._fit_prompt(hits)
            target = self.encode_caption(caption, max_caption_tokens)
            sequences.append(prompt + target)
            labels.append([-100] * len(prompt) + target)
        ids, mask = self._pad(sequences, None, left=False)
        padded_labels = torch.full_like(ids, -100)
        for row, label in enumerate(labels):
            padded_labels[row, : len(label)] = torch.tensor(label)
        return BatchFeature({"decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": padded_labels})

    def encode_caption(self, caption: str, max_caption_tokens: int = DEFAULT_MAX_CAPTION_TOKENS) -> list[int]:
        """Token ids of a caption as it follows a prompt: `target_prefix` before it, the end token behind it."""
        target = self._encode(self.target_prefix + " ".join(caption.split()))[:max_caption_tokens]
        return [*target, self.tokenizer.eos_token_id]

    def caption_tokens(self, captions: Sequence[str]) -> list[slice]:
        """Where in the token ids of their prompt the captions stand; an empty slice for one that the prompt lacks."""
        prompt = self.prompt
        places = prompt.places(captions)
        encoded = self.tokenizer(prompt.build(captions), add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        slices = []
        for start, end in places:
            own = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
            slices.append(slice(own[0], own[-1] + 1) if own else slice(0, 0))
        return slices

    def _fit_prompt(self, hits: Sequence[dict[str, Any] | str]) -> tuple[list[int], int]:
        """Token ids of the prompt and how many captions it has: the farthest go until it fits."""
        captions = [hit if isinstance(hit, str) else hit["caption"] for hit in hits]
        for count in range(len(captions), -1, -1):
            tokens = self._encode(self.prompt.build(captions[:count]))
            if len(tokens) <= self.max_prompt_tokens:
                return tokens, count
        raise ValueError(
            f"A prompt without captions has {len(tokens)} tokens, more than "
            f"`max_prompt_tokens`={self.max_prompt_tokens}."
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pad(
        self, sequences: Sequence[Sequence[int]], device: Any, left: bool
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        length = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
            ids[row, place] = torch.tensor(sequence, dtype=torch.long)
            mask[row, place] = 1
        return ids.to(device), mask.to(device)

    # ----------------------------------------------------------- captions out

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Captions out of generated sequences, without the prompts that they begin with."""
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        return [self.prompt.strip(text) for text in texts]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """The caption of one sequence, without the prompt."""
        return self.batch_decode([token_ids], skip_special_tokens=skip_special_tokens, **kwargs)[0]

    # ---------------------------------------------------------- check, files

    def check_model(self, model: Any) -> None:
        """Refuses a model that this processor or its datastore does not belong to.

        Raises:
            `ValueError`: if the tokenizer knows more tokens than the decoder, the prompt leaves no room for a
                caption, the windows differ, or the datastore comes from another encoder.
        """
        checked = (id(model), id(self._datastore))
        if checked == self._checked:
            return
        config = model.config
        if len(self.tokenizer) > config.decoder.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, the decoder's vocabulary "
                f"{config.decoder.vocab_size}: they do not belong together."
            )
        if self.tokenizer.eos_token_id != config.eos_token_id:
            raise ValueError(
                f"The tokenizer's end token has the id {self.tokenizer.eos_token_id}, the model's configuration says "
                f"{config.eos_token_id}."
            )
        if self.feature_extractor.max_length_s != config.window_length_s:
            raise ValueError(
                f"The feature extractor's windows have {self.feature_extractor.max_length_s} s, the model's "
                f"{config.window_length_s} s."
            )
        if self.max_prompt_tokens + config.prefix_places >= config.decoder.n_positions:
            prefix = f" (prefix: {config.prefix_places})" if config.prefix_places else ""
            raise ValueError(
                f"`max_prompt_tokens` is {self.max_prompt_tokens}, but the decoder has {config.decoder.n_positions} "
                f"positions for prompt and caption together{prefix}."
            )
        if self.datastore is not None:
            self.datastore.check_encoder(model.embed_fingerprint(self))
        self._checked = checked

    def to_dict(self) -> dict[str, Any]:
        # The base class copies every attribute deeply: not the datastore, which may hold gigabytes.
        stores = {name: self.__dict__.pop(name) for name in ("_datastore", "_own_datastore")}
        try:
            output = super().to_dict()
        finally:
            self.__dict__.update(stores)
        output["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoFeatureExtractor", "AutoProcessor")}
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers; datastore and code travel along, and nothing written names a path of this machine."""
        os.makedirs(save_directory, exist_ok=True)
        copy_travelling_files(save_directory)
        if self.datastore is not None:
            self.datastore.save_pretrained(Path(save_directory) / DATASTORE_FOLDER)
        options = take_push_options(kwargs)
        saved = super().save_pretrained(save_directory, **kwargs)
        complete_tokenizer_folder(save_directory)
        if push_to_hub:
            self.push_saved(save_directory, options)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> RecapProcessor:
        """As in transformers; `datastore=` replaces the datastore that the checkpoint brings."""
        datastore = kwargs.pop("datastore", None)
        with loading_errors("the processor", pretrained_model_name_or_path, kwargs.get("revision")):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not datastore:
            datastore = processor._own_datastore = _find_datastore(pretrained_model_name_or_path, kwargs)
        processor.datastore = datastore
        return processor


def _find_datastore(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> CaptionDatastore | None:
    """The datastore inside a checkpoint, or `None`: a processor without one is complete too."""
    hub_kwargs = {
        name: kwargs[name]
        for name in ("cache_dir", "force_download", "local_files_only", "revision", "token")
        if name in kwargs
    }
    subfolder = os.path.join(kwargs.get("subfolder", ""), DATASTORE_FOLDER)
    if Path(name_or_path).is_dir() and not Path(name_or_path, subfolder).is_dir():
        return None
    if Path(name_or_path).is_dir() is False and not _has_datastore(name_or_path, subfolder, hub_kwargs):
        return None
    return CaptionDatastore.from_pretrained(name_or_path, subfolder=subfolder, repo_type="model", **hub_kwargs)


def _has_datastore(name_or_path: str | os.PathLike, subfolder: str, hub_kwargs: dict[str, Any]) -> bool:
    from transformers.utils import cached_file

    found = cached_file(
        str(name_or_path),
        "datastore.json",
        subfolder=subfolder,
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    return found is not None


__all__ = ["RecapProcessor"]
