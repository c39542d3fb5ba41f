"""Configuration of a RECAP captioner: a CLAP, a GPT-2 and the shapes of what lies between them."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import ClapConfig, GPT2Config, PretrainedConfig

from .encoder_recap import AUDIO_POSITIONS, RecapClapEncoder
from .mobilenet_clap_recap import MobileNetClapModel

AUTO_MAP = {
    "AutoConfig": "configuration_recap.RecapConfig",
    "AutoModel": "modeling_recap.RecapForConditionalGeneration",
    "AutoModelForSpeechSeq2Seq": "modeling_recap.RecapForConditionalGeneration",
    "AutoFeatureExtractor": "feature_extraction_recap.RecapFeatureExtractor",
    "AutoProcessor": "processing_recap.RecapProcessor",
}
PIPELINE_TASK = "audio-captioning"
CROSS_ATTENTION, PREFIX, UNTRAINED = CONDITIONINGS = ("cross_attention", "prefix", "none")
HIDDEN, EMBEDDING = ENCODER_STATES = ("hidden", "embedding")
_PIPELINE = "pipeline_recap.AudioCaptioningPipeline"
CUSTOM_PIPELINES = {PIPELINE_TASK: {"impl": _PIPELINE, "pt": ["AutoModelForSpeechSeq2Seq"], "type": "multimodal"}}
_MODEL_AUTO_MAP = {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoModel", "AutoModelForSpeechSeq2Seq")}
# Keys of version 0.1, whose settings belong to the processor now (the last one is gone).
_PROCESSOR_SETTINGS = ("num_retrieved_captions", "prompt_template", "caption_separator", "prompt_without_captions")
_PROCESSOR_SETTINGS += ("target_prefix", "retrieval_diversity", "retrieval_score_drop", "confidence")
# The encoder classes by the `model_type` of their configurations.
ENCODERS: dict[str, Any] = {cls.config_class.model_type: cls for cls in (RecapClapEncoder, MobileNetClapModel)}


def encoder_class(config: PretrainedConfig | dict[str, Any] | None) -> Any:
    """The encoder class for a configuration; default: LAION's CLAP.

    Raises:
        `ValueError`: for a `model_type` without a class.
    """
    if config is None:
        return RecapClapEncoder
    name = config.get("model_type", ClapConfig.model_type) if isinstance(config, dict) else config.model_type
    if name not in ENCODERS:
        raise ValueError(f"`clap` must be the configuration of one of {', '.join(ENCODERS)}, got one of {name!r}.")
    return ENCODERS[name]


class RecapConfig(PretrainedConfig):
    r"""
    Configuration of [`RecapForConditionalGeneration`]: shapes. Prompt and retrieval are settings of
    [`RecapProcessor`], decoding stands in `generation_config.json`.

    Args:
        clap (`ClapConfig`, `MobileNetClapConfig` or `dict`, *optional*, defaults to `ClapConfig()`):
            The audio and the text tower. The audio tower's last hidden state conditions the decoder, both towers'
            projections make the queries and the datastore. Copied.
        decoder (`GPT2Config` or `dict`, *optional*, defaults to `GPT2Config()`):
            The language model. `add_cross_attention` and `is_decoder` are set in a copy.
        cross_attention_reduce_factor (`int`, *optional*, defaults to 4):
            The width of the cross-attention is the decoder's divided by this. 4 gives 5.4 % trained parameters with
            GPT-2 small, the paper's figure (Section 3.1); 1 is the stock layer of `add_cross_attention`.
        conditioning (`str`, *optional*, defaults to `"cross_attention"`):
            How the decoder is conditioned on the audio: `"cross_attention"` (RECAP) or `"prefix"`, embeddings before
            the prompt (after Kim et al., the paper's [6]); the decoder then has none of it. `"none"`: untrained.
        encoder_states (`str`, *optional*, defaults to `"hidden"`):
            What the decoder attends to: the audio tower's last hidden state (the paper) or `"embedding"`, for each
            window its embedding in CLAP's joint space, which a caption's embedding can stand for in training.
        prefix_length (`int`, *optional*, defaults to 10): embeddings of the prefix.
        prefix_num_layers (`int`, *optional*, defaults to 2): layers of the network that maps audio to the prefix.
        audio_position_embedding (`str`, *optional*):
            `"sinusoidal"` adds fixed position embeddings along time to the audio tower's last hidden state, so that
            the decoder can tell what came first: cross-attention does not know the order of what it attends to, and
            CLAP's audio tower keeps little of it. `None`, the default, is the paper's model.
        window_length_s (`float`, *optional*):
            Length in seconds of one window of the audio tower; default: the encoder's, 10.0 for `ClapConfig`. A longer
            clip becomes several windows.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Special tokens of the decoder; they default to the decoder configuration's. GPT-2 has no padding token:
            its end-of-text token then pads, and masks alone tell what is padding.

    Raises:
        `ValueError`: if the parts do not fit each other; the message names both values.
        `TypeError`: for a setting of the processor.
    """

    model_type = "recap"
    sub_configs = {"clap": ClapConfig, "decoder": GPT2Config}  # noqa: RUF012 (the base class's own convention)
    # `pipeline` demands trust_remote_code for the tasks in `custom_pipelines`. The installed package registers its own
    # pipeline and sets this to False.
    is_remote_code = True

    def __init__(
        self,
        clap: ClapConfig | dict[str, Any] | None = None,
        decoder: GPT2Config | dict[str, Any] | None = None,
        cross_attention_reduce_factor: int = 4,
        conditioning: str = CROSS_ATTENTION,
        prefix_length: int = 10,
        prefix_num_layers: int = 2,
        encoder_states: str = HIDDEN,
        audio_position_embedding: str | None = None,
        window_length_s: float | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        moved = [name for name in _PROCESSOR_SETTINGS if name in kwargs]
        if moved:
            raise TypeError(
                f"RecapConfig has no {', '.join(moved)}: prompt and retrieval are settings of RecapProcessor. Pass "
                "them to RecapProcessor.from_config(config, ...)."
            )
        encoder = encoder_class(clap if clap else None)
        self.clap = _sub_config("clap", clap, encoder.config_class)
        self.decoder = _sub_config("decoder", decoder, GPT2Config)
        self.decoder.add_cross_attention = conditioning == CROSS_ATTENTION
        self.decoder.is_decoder = True
        self.cross_attention_reduce_factor = cross_attention_reduce_factor
        self.conditioning = conditioning
        self.prefix_length = prefix_length
        self.prefix_num_layers = prefix_num_layers
        self.encoder_states = encoder_states
        self.audio_position_embedding = audio_position_embedding
        self.window_length_s = encoder.window_seconds(self.clap) if window_length_s is None else window_length_s
        self.eos_token_id = self.decoder.eos_token_id if eos_token_id is None else eos_token_id
        self.bos_token_id = self.decoder.bos_token_id if bos_token_id is None else bos_token_id
        pad_token_id = self.decoder.pad_token_id if pad_token_id is None else pad_token_id
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id
        if self.decoder.pad_token_id is None:
            # A Trainer compares the tokenizer's with this one, and says so where they differ.
            self.decoder.pad_token_id = self.pad_token_id
        # A saved configuration carries these with the values that the code knows anyway.
        for key in ("is_encoder_decoder", "decoder_start_token_id"):
            kwargs.pop(key, None)
        # AutoModel and `pipeline` look here for the code; loaded from the Hub, both name the repository too.
        self.auto_map = kwargs.pop("auto_map", None) or dict(_MODEL_AUTO_MAP)
        custom_pipelines = kwargs.pop("custom_pipelines", None) or CUSTOM_PIPELINES
        if self.is_remote_code:
            self.custom_pipelines = custom_pipelines
        kwargs.setdefault("tie_word_embeddings", self.decoder.tie_word_embeddings)
        super().__init__(is_encoder_decoder=True, **kwargs)
        # Nothing is put before the prompt, so there is no start token (official code: decoder_start_token_id = None).
        self.decoder_start_token_id = None
        self._validate()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. Settings that version 0.1 kept here stand in the processor's file, too, and are left
        out."""
        kept = {name: value for name, value in config_dict.items() if name not in _PROCESSOR_SETTINGS}
        return super().from_dict(kept, **kwargs)

    def _validate(self) -> None:
        width, heads, factor = self.decoder.n_embd, self.decoder.n_head, self.cross_attention_reduce_factor
        if not isinstance(factor, int) or factor < 1 or width % heads or (width // heads) % factor:
            raise ValueError(
                f"`cross_attention_reduce_factor` must be a positive integer that divides the decoder's head size: "
                f"got {factor!r} for n_embd={width} and n_head={heads} (head size {width / heads:g})."
            )
        choices = {"conditioning": CONDITIONINGS, "encoder_states": ENCODER_STATES}
        choices["audio_position_embedding"] = AUDIO_POSITIONS if self.encoder_states == HIDDEN else (None,)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                fits = ", ".join(map(str, known)) + (" (of embeddings)" if known == (None,) else "")
                raise ValueError(f"`{name}` must be one of {fits}, got {getattr(self, name)!r}.")
        for name in ("prefix_length", "prefix_num_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.prefix_places >= self.decoder.n_positions:
            raise ValueError(
                f"`prefix_length` is {self.prefix_length}, but the decoder has {self.decoder.n_positions} positions "
                "for prefix, prompt and caption together."
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

    @property
    def prefix_places(self) -> int:
        """Positions of the decoder that a prefix takes: `prefix_length`, or 0 with cross-attention."""
        return self.prefix_length if self.conditioning == PREFIX else 0

    @property
    def encoder_hidden_size(self) -> int:
        """d, the width of the states that the cross-attention reads."""
        hidden = self.encoder_states == HIDDEN
        return encoder_class(self.clap).hidden_size(self.clap) if hidden else self.clap.projection_dim

    @property
    def cross_attention_width(self) -> int:
        """Width of queries, keys and values in the cross-attention, over all heads."""
        return self.decoder.n_embd // self.cross_attention_reduce_factor

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # Whatever repository this one was loaded from: the code lies beside what is saved.
        output["auto_map"] = dict(_MODEL_AUTO_MAP)
        output["custom_pipelines"] = CUSTOM_PIPELINES
        return output


def _sub_config(name: str, value: Any, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    if value is None:
        return config_class()
    if isinstance(value, config_class):
        return copy.deepcopy(value)
    if isinstance(value, dict):
        found = value.get("model_type", config_class.model_type)
        if found != config_class.model_type:
            raise ValueError(
                f"`{name}` must be the configuration of a {config_class.model_type!r} model, got one of {found!r}."
            )
        return config_class(**{key: item for key, item in value.items() if key != "model_type"})
    raise TypeError(f"`{name}` must be a {config_class.__name__}, a dict or None, got {type(value).__name__}.")


@contextlib.contextmanager
def loading(name: Any, files: str) -> Iterator[None]:
    """Turns what damaged files of a checkpoint raise into a `ValueError` of one line that names folder and files."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ValueError(f"{name}: {files} cannot be loaded: {text}") from error


def push_arguments(folder: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of `push_to_hub` out of those of `save_pretrained(folder, push_to_hub=True)`.

    With that argument transformers pushes only the files that its own `save_pretrained` writes, neither code nor
    datastore. So the classes here save first and then call their `push_to_hub`.
    """
    names = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
    taken = {name: kwargs.pop(name) for name in names if name in kwargs}
    shared = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
    return {"repo_id": Path(folder).name, **taken, **shared}


def copy_remote_code(folder: str | os.PathLike) -> None:
    """Copies the files beside this one into a checkpoint, so that `trust_remote_code=True` can load it where the
    package is not installed. (transformers copies the files of one Auto class; a checkpoint has five and a pipeline.)
    """
    for source in sorted(Path(__file__).parent.glob("*_recap.py")):
        target = Path(folder, source.name)
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


__all__ = ["RecapConfig"]
