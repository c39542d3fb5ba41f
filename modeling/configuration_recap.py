"""Configuration of a RECAP captioner: a CLAP, a GPT-2 and what lies between them."""

from __future__ import annotations

from typing import Any

from transformers import ClapConfig, GPT2Config, PretrainedConfig

from .audio_position_recap import AUDIO_POSITIONS, SINUSOIDAL
from .confidence_recap import ConfidenceModel
from .datastore_choice_recap import check_choice
from .prefix_recap import CONDITIONINGS, CROSS_ATTENTION, PREFIX
from .prompt_recap import PAPER_PROMPT, PromptTemplate
from .travelling_recap import AUTO_MAP, CUSTOM_PIPELINES

CLAP_SAMPLING_RATE = 48_000
MODEL_AUTO_MAP = {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoModel", "AutoModelForSpeechSeq2Seq")}


class RecapConfig(PretrainedConfig):
    r"""
    Configuration of [`RecapForConditionalGeneration`].

    Args:
        clap (`ClapConfig` or `dict`, *optional*, defaults to `ClapConfig()`):
            The audio and the text tower. The audio tower's last hidden state conditions the decoder, both towers'
            projections make the queries and the datastore.
        decoder (`GPT2Config` or `dict`, *optional*, defaults to `GPT2Config()`):
            The language model. `add_cross_attention` and `is_decoder` are set here.
        cross_attention_reduce_factor (`int`, *optional*, defaults to 4):
            The width of the cross-attention is the decoder's divided by this. 4 gives 5.4 % trained parameters with
            GPT-2 small, the paper's figure (Section 3.1); 1 is the stock layer of `add_cross_attention`.
        conditioning (`str`, *optional*, defaults to `"cross_attention"`):
            How the decoder hears the audio: `"cross_attention"` (RECAP) or `"prefix"`, embeddings before the prompt
            instead (after Kim et al., the paper's [6]); the decoder then has no cross-attention.
        prefix_length (`int`, *optional*, defaults to 10): embeddings of the prefix.
        prefix_num_layers (`int`, *optional*, defaults to 2): layers of the network that maps audio to the prefix.
        audio_position_embedding (`str`, *optional*):
            `"sinusoidal"` adds fixed position embeddings along time to the audio tower's last hidden state, so that
            the decoder can tell what came first: cross-attention does not know the order of what it attends to, and
            CLAP's audio tower keeps little of it. `None`, the default, is the paper's model.
        num_retrieved_captions (`int`, *optional*, defaults to 4):
            k, the number of captions in the prompt (Section 4 of the paper).
        prompt_template (`str`, *optional*):
            The prompt, with `{captions}` where the retrieved captions go. Defaults to the paper's (Section 3.1).
        caption_separator (`str`, *optional*, defaults to `", "`):
            What stands between two retrieved captions.
        prompt_without_captions (`str`, *optional*, defaults to `"This audio sounds like:"`):
            The prompt when there is nothing to retrieve.
        target_prefix (`str`, *optional*, defaults to `" "`):
            What joins prompt and caption when the target of the training is tokenized.
        window_length_s (`float`, *optional*, defaults to 10.0):
            Length in seconds of one window of the audio tower. A longer clip becomes several windows.
        confidence (`dict`, *optional*):
            The calibration of captions' confidences, `{"weights": {feature: number}, "intercept": number}` as
            [`ConfidenceModel`] takes it. Without one the pipeline gives no confidence.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Special tokens of the decoder; they default to the decoder configuration's. GPT-2 has no padding token:
            its end-of-text token then pads, and masks alone tell what is padding.
        retrieval_diversity (`float`, *optional*, defaults to 0.0):
            0 takes the nearest captions, as the paper does; above it, up to 1, captions that differ from each other
            (maximal marginal relevance, see [`CaptionDatastore.search`]).
        retrieval_score_drop (`float`, *optional*):
            Leaves captions out that score so much less than the nearest. Off by default.

    Raises:
        `ValueError`: if the parts do not fit each other; the message names both values.

    Example:
        >>> config = RecapConfig()
        >>> config.cross_attention_width
        192
    """

    model_type = "recap"
    sub_configs = {"clap": ClapConfig, "decoder": GPT2Config}  # noqa: RUF012 (the base class's own convention)

    def __init__(
        self,
        clap: ClapConfig | dict[str, Any] | None = None,
        decoder: GPT2Config | dict[str, Any] | None = None,
        cross_attention_reduce_factor: int = 4,
        conditioning: str = CROSS_ATTENTION,
        prefix_length: int = 10,
        prefix_num_layers: int = 2,
        audio_position_embedding: str | None = None,
        num_retrieved_captions: int = 4,
        prompt_template: str = PAPER_PROMPT.template,
        caption_separator: str = PAPER_PROMPT.separator,
        prompt_without_captions: str = PAPER_PROMPT.without_captions,
        target_prefix: str = PAPER_PROMPT.target_prefix,
        window_length_s: float = 10.0,
        confidence: dict[str, Any] | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        retrieval_diversity: float = 0.0,
        retrieval_score_drop: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.clap = _sub_config("clap", clap, ClapConfig)
        self.decoder = _sub_config("decoder", decoder, GPT2Config)
        self.decoder.add_cross_attention = conditioning == CROSS_ATTENTION
        self.decoder.is_decoder = True
        self.cross_attention_reduce_factor = cross_attention_reduce_factor
        self.conditioning = conditioning
        self.prefix_length = prefix_length
        self.prefix_num_layers = prefix_num_layers
        self.audio_position_embedding = audio_position_embedding
        self.num_retrieved_captions = num_retrieved_captions
        self.retrieval_diversity = retrieval_diversity
        self.retrieval_score_drop = retrieval_score_drop
        self.prompt_template = prompt_template
        self.caption_separator = caption_separator
        self.prompt_without_captions = prompt_without_captions
        self.target_prefix = target_prefix
        self.window_length_s = window_length_s
        self.confidence = confidence
        eos_token_id = self.decoder.eos_token_id if eos_token_id is None else eos_token_id
        bos_token_id = self.decoder.bos_token_id if bos_token_id is None else bos_token_id
        pad_token_id = self.decoder.pad_token_id if pad_token_id is None else pad_token_id
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self.pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
        if self.decoder.pad_token_id is None:
            # A Trainer compares the tokenizer's with this one, and says so where they differ.
            self.decoder.pad_token_id = self.pad_token_id
        # A saved configuration carries these with the values that the code knows anyway.
        for key in ("is_encoder_decoder", "decoder_start_token_id"):
            kwargs.pop(key, None)
        # AutoModel and `pipeline` look here for the code; loaded from the Hub, `auto_map` names the repository too.
        self.auto_map = kwargs.pop("auto_map", None) or dict(MODEL_AUTO_MAP)
        custom_pipelines = kwargs.pop("custom_pipelines", None) or CUSTOM_PIPELINES
        # `pipeline` demands trust_remote_code for a task named here; the installed package has its own.
        if not __name__.startswith("recap_hf."):
            self.custom_pipelines = custom_pipelines
        kwargs.setdefault("tie_word_embeddings", self.decoder.tie_word_embeddings)
        super().__init__(is_encoder_decoder=True, **kwargs)
        # Nothing is put before the prompt, so there is no start token (official code: decoder_start_token_id = None).
        self.decoder_start_token_id = None
        self._validate()

    def _validate(self) -> None:
        width, heads, factor = self.decoder.n_embd, self.decoder.n_head, self.cross_attention_reduce_factor
        if not isinstance(factor, int) or factor < 1 or width % heads or (width // heads) % factor:
            raise ValueError(
                f"`cross_attention_reduce_factor` must be a positive integer that divides the decoder's head size: "
                f"got {factor!r} for n_embd={width} and n_head={heads} (head size {width / heads:g})."
            )
        self._validate_conditioning()
        if not isinstance(self.num_retrieved_captions, int) or self.num_retrieved_captions < 0:
            raise ValueError(
                f"`num_retrieved_captions` must be an integer of at least 0, got {self.num_retrieved_captions!r}."
            )
        if not self.window_length_s > 0:
            raise ValueError(f"`window_length_s` must be a positive number of seconds, got {self.window_length_s!r}.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.decoder.vocab_size:
                raise ValueError(
                    f"`{name}` is {value}, outside the decoder's vocabulary of {self.decoder.vocab_size} tokens "
                    f"(0 to {self.decoder.vocab_size - 1}): give an id that the decoder's tokenizer knows."
                )
        check_choice(self.retrieval_diversity, self.retrieval_score_drop, "retrieval_")
        # These two check themselves.
        self.prompt  # noqa: B018
        ConfidenceModel.of(self.confidence)

    def _validate_conditioning(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"`conditioning` must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}.")
        if self.audio_position_embedding not in AUDIO_POSITIONS:
            raise ValueError(
                f"`audio_position_embedding` must be None or {SINUSOIDAL!r}, got {self.audio_position_embedding!r}."
            )
        for name in ("prefix_length", "prefix_num_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.prefix_places >= self.decoder.n_positions:
            raise ValueError(
                f"`prefix_length` is {self.prefix_length}, but the decoder has {self.decoder.n_positions} positions "
                "for prefix, prompt and caption together."
            )

    @property
    def prefix_places(self) -> int:
        """Positions of the decoder that a prefix takes: `prefix_length`, or 0 with cross-attention."""
        return self.prefix_length if self.conditioning == PREFIX else 0

    @property
    def prompt(self) -> PromptTemplate:
        """The prompt settings as the object that builds prompts."""
        return PromptTemplate.of(self)

    @property
    def encoder_hidden_size(self) -> int:
        """d, the width of the audio tower's last hidden state that the cross-attention reads."""
        audio = self.clap.audio_config
        return audio.patch_embeds_hidden_size * 2 ** (len(audio.depths) - 1)

    @property
    def cross_attention_width(self) -> int:
        """Width of queries, keys and values in the cross-attention, over all heads."""
        return self.decoder.n_embd // self.cross_attention_reduce_factor

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # Whatever repository this one was loaded from: the code lies beside what is saved.
        output["auto_map"] = dict(MODEL_AUTO_MAP)
        output["custom_pipelines"] = CUSTOM_PIPELINES
        return output


def _sub_config(name: str, value: Any, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    if value is None:
        return config_class()
    if isinstance(value, config_class):
        return value
    if isinstance(value, dict):
        found = value.get("model_type", config_class.model_type)
        if found != config_class.model_type:
            raise ValueError(
                f"`{name}` must be the configuration of a {config_class.model_type!r} model, got one of {found!r}."
            )
        return config_class(**{key: item for key, item in value.items() if key != "model_type"})
    raise TypeError(f"`{name}` must be a {config_class.__name__}, a dict or None, got {type(value).__name__}.")


__all__ = ["CLAP_SAMPLING_RATE", "RecapConfig"]
