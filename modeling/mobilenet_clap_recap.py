"""A small CLAP: YAMNet's MobileNet v1 as the audio tower, a small transformer as the text tower.

The audio tower reads log-mel patches of 0.96 s, one each 0.48 s (M. Plakal and D. Ellis, YAMNet, 2019; A. Howard et
al., "MobileNets", arXiv 1704.04861). Its batch norms are folded into the convolutions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ClapTextConfig, ClapTextModel, PretrainedConfig, PreTrainedModel
from transformers.models.clap.modeling_clap import ClapOutput

from .encoder_recap import SINUSOIDAL, TextEmbedder, sinusoidal_positions

# Output channels and strides of the thirteen pairs of a depthwise and a pointwise convolution.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# log(0.001): the log-mel of digital silence; see `RecapFeatureExtractor`. Features may have passed through fp16.
LOG_MEL_FLOOR = math.log(0.001)
_FLOOR_TOLERANCE = 0.01
_PATCHES_AT_ONCE = 28
# Of so many channels, which have few places, a CPU is faster with a matrix product than with a convolution.
_MANY = 256


class MobileNetClapConfig(PretrainedConfig):
    r"""
    Configuration of [`MobileNetClapModel`].

    Args:
        text_config (`ClapTextConfig` or `dict`, *optional*): the text tower; default: two layers of width 256.
        projection_dim (`int`, *optional*, defaults to 256): width of the joint space.
        projection_hidden_size (`int`, *optional*, defaults to 512): hidden width of both projections.
        width_multiplier (`float`, *optional*, defaults to 1.0): factor of the convolutions' channels.
        num_mel_bins (`int`, *optional*, defaults to 64): mel bins of a frame.
        patch_frames (`int`, *optional*, defaults to 96): frames of 10 ms that the tower reads at once.
        patch_hop (`int`, *optional*, defaults to 48): frames between patches. Patch `i` is centred on the frames
            `[i * patch_hop, (i + 1) * patch_hop)`.
        window_patches (`int`, *optional*, defaults to 21): patches of a window: 10.08 s.
        logit_scale_init_value (`float`, *optional*, defaults to 1 / 0.07): first factor of the similarities.
        kwargs: `id2label`: the classes of the classification head (521 of AudioSet with YAMNet's weights).
    """

    model_type = "mobilenet_clap"
    sub_configs = {"text_config": ClapTextConfig}  # noqa: RUF012 (the base class's own convention)

    def __init__(
        self,
        text_config: ClapTextConfig | dict[str, Any] | None = None,
        projection_dim: int = 256,
        projection_hidden_size: int = 512,
        width_multiplier: float = 1.0,
        num_mel_bins: int = 64,
        patch_frames: int = 96,
        patch_hop: int = 48,
        window_patches: int = 21,
        logit_scale_init_value: float = 1 / 0.07,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
            text_config |= {"intermediate_size": 1024, "max_position_embeddings": 80, "vocab_size": 4096}
        if not isinstance(text_config, ClapTextConfig):
            text_config = ClapTextConfig(**{name: v for name, v in text_config.items() if name != "model_type"})
        self.text_config = text_config
        self.projection_dim = projection_dim
        self.projection_hidden_size = projection_hidden_size
        self.width_multiplier = width_multiplier
        self.num_mel_bins = num_mel_bins
        self.patch_frames = patch_frames
        self.patch_hop = patch_hop
        self.window_patches = window_patches
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**kwargs)
        if patch_frames < patch_hop or (patch_frames - patch_hop) % 2:
            raise ValueError(
                "`patch_frames` must be at least `patch_hop` and differ from it by an even number, got "
                f"{patch_frames} and {patch_hop}."
            )


class _Convolution(nn.Module):
    """A convolution with TensorFlow's SAME padding, which puts the odd row at the end, and ReLU6."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, stride, groups=groups)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        layer = self.convolution
        (size, _), (stride, _) = layer.kernel_size, layer.stride
        if size == 1 and layer.in_channels >= _MANY and states.is_contiguous(memory_format=torch.channels_last):
            states = F.linear(states.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias)
            return F.relu6(states, inplace=True).permute(0, 3, 1, 2)
        missing = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in states.shape[-2:]]
        # Zeros before the kernel stand for the odd row or column at the end: the states need not be copied.
        odd, padding = [number % 2 for number in missing], [-(-number // 2) for number in missing]
        weight = F.pad(layer.weight, (odd[1], 0, odd[0], 0)) if any(odd) else layer.weight
        states = F.conv2d(states, weight, layer.bias, layer.stride, padding, groups=layer.groups)
        return F.relu6(states, inplace=True)


class MobileNetAudioTower(nn.Module):
    """Features of log-mel patches: `(N, patch_frames, num_mel_bins)` -> `(N, d)`, float, not negative."""

    def __init__(self, config: MobileNetClapConfig) -> None:
        super().__init__()
        width = _scaled(32, config)
        layers = [_Convolution(1, width, 3, 2)]
        for channels, stride in _BLOCKS:
            channels = _scaled(channels, config)
            layers += [_Convolution(width, width, 3, stride, groups=width), _Convolution(width, channels, 1, 1)]
            width = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # The channel is last in memory: so the convolutions leave theirs, which is faster on CPUs.
        states = patches[..., None].permute(0, 3, 1, 2) if _eager_on_cpu(patches) else patches[:, None]
        return self.layers(states).mean(dim=(2, 3))

    def of_sound(self, patches: torch.Tensor, has_sound: torch.Tensor) -> torch.Tensor:
        """Features of `(N, n)` patches, `(N, n, d)`; zero where `has_sound`, `(N, n)` and boolean, is false. On a CPU,
        patches without sound cost nothing, and the others run some at a time, so that states fit its cache."""
        if not _eager_on_cpu(patches):
            return self(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]) * has_sound[..., None]
        features = torch.cat([self(chunk) for chunk in patches[has_sound].split(_PATCHES_AT_ONCE)])
        return features.new_zeros(*has_sound.shape, features.shape[-1]).masked_scatter(has_sound[..., None], features)


def _eager_on_cpu(patches: torch.Tensor) -> bool:
    return patches.device.type == "cpu" and not (torch.compiler.is_exporting() or torch.jit.is_tracing())


class _Projection(nn.Module):
    def __init__(self, width: int, config: MobileNetClapConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.projection_hidden_size)
        self.dropout = nn.Dropout(0.0)
        self.linear2 = nn.Linear(config.projection_hidden_size, config.projection_dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.dropout(F.gelu(self.linear1(self.norm(states)))))


class MobileNetClapModel(TextEmbedder, PreTrainedModel):
    """Audio and text in one space, and the classes that the audio tower tells apart; see the configuration."""

    config_class = MobileNetClapConfig
    base_model_prefix = "clap"
    main_input_name = "input_features"

    def __init__(self, config: MobileNetClapConfig) -> None:
        super().__init__(config)
        width = self.hidden_size(config)
        self.audio_model = MobileNetAudioTower(config)
        self.classifier = nn.Linear(width, config.num_labels)
        # Mean and maximum over the patches: the one dilutes short sounds, the other exaggerates noise.
        self.audio_projection = _Projection(2 * width, config)
        self.text_model = ClapTextModel(config.text_config, add_pooling_layer=False)
        self.text_projection = _Projection(config.text_config.hidden_size, config)
        scale = math.log(config.logit_scale_init_value)
        self.logit_scale_a = nn.Parameter(torch.tensor(scale))
        self.logit_scale_t = nn.Parameter(torch.tensor(scale))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @staticmethod
    def hidden_size(config: MobileNetClapConfig) -> int:
        """d, the width of the states."""
        return _scaled(1024, config)

    @staticmethod
    def grid(config: MobileNetClapConfig) -> tuple[int, int]:
        """(F, T): one band of all frequencies, a time cell per patch (0.48 s)."""
        return 1, config.window_patches

    @staticmethod
    def feature_settings(config: MobileNetClapConfig) -> dict[str, Any]:
        """What the configuration says about the feature extractor: YAMNet's log-mel at 16 kHz, the window's length."""
        length = MobileNetClapModel.window_seconds(config)
        return {"spectrogram": "yamnet", "feature_size": config.num_mel_bins, "max_length_s": length}

    input_normalisation = None  # The tower has no batch norm.

    @staticmethod
    def window_seconds(config: MobileNetClapConfig) -> float:
        """Length of a window: 10.08 s by default."""
        return config.window_patches * config.patch_hop / 100

    def encode_windows(
        self, windows: torch.Tensor, position_embedding: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and embeddings of windows.

        A patch whose own 0.48 s are digital silence (or lie behind the end of a short clip) is not pooled, and its
        state is zero: a captioner does not attend to it. A window of silence keeps all.

        Args:
            windows (`torch.Tensor` of shape `(N, 1, num_frames, num_mel_bins)`): log-mel features.
            position_embedding (`str`, *optional*): `"sinusoidal"` adds fixed position embeddings along time.

        Returns:
            `tuple`: states of shape `(N, n, d)`, each with mean 0 and variance 1, and L2-normalised float32 embeddings
            of shape `(N, projection_dim)`.
        """
        features = self.audio_features(windows)
        states = F.layer_norm(features, features.shape[-1:])
        if position_embedding == SINUSOIDAL:
            states = states + sinusoidal_positions(*states.shape[1:]).to(states)
        return states * _holds_sound(features), self.embed_features(features)

    def audio_features(self, windows: torch.Tensor) -> torch.Tensor:
        """The audio tower's features of the patches of windows, `(N, 1, num_frames, num_mel_bins)` -> `(N, n, d)`;
        zero for a patch without sound."""
        config, frames = self.config, windows[:, 0]
        length = config.window_patches * config.patch_hop
        if frames.shape[1] != length:
            raise ValueError(f"Windows must have {length} frames, got {frames.shape[1]}: see `RecapFeatureExtractor`.")
        loud = (frames > LOG_MEL_FLOOR + _FLOOR_TOLERANCE).any(dim=-1)
        has_sound = loud.unflatten(1, (config.window_patches, config.patch_hop)).any(dim=-1)
        has_sound = has_sound | ~has_sound.any(dim=1, keepdim=True)
        margin = (config.patch_frames - config.patch_hop) // 2
        frames = F.pad(frames, (0, 0, margin, margin), value=LOG_MEL_FLOOR)
        patches = frames.unfold(1, config.patch_frames, config.patch_hop).transpose(2, 3)
        return self.audio_model.of_sound(patches, has_sound)

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Audio embeddings of `audio_features`, `(N, n, d)` -> `(N, projection_dim)`, L2-normalised, float32."""
        holds = _holds_sound(features)
        mean = features.sum(dim=1) / holds.sum(dim=1)
        # Features are not negative: a zero is never the maximum of a patch that counts.
        pooled = torch.cat([mean, features.amax(dim=1)], dim=-1)
        return F.normalize(self.audio_projection(pooled).float(), dim=-1)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Text embeddings of shape `(batch_size, projection_dim)`, L2-normalised, float32: the mean of the tokens."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return F.normalize(self.text_projection(mean).float(), dim=-1)

    def classify_features(self, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities of patches, `(N, n, d)` -> `(N, n, num_labels)`; zero where there is no sound."""
        return self.classifier(features).float().sigmoid() * _holds_sound(features)

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Embeddings of clips, `(clips, projection_dim)`: the normalised mean of the embeddings of their windows.
        `input_features` have the shape `(clips, num_windows, num_frames, num_mel_bins)`; the mask, `(clips,
        num_windows)`, is 1 for windows to use."""
        mask = input_features_mask
        mask = input_features.new_ones(input_features.shape[:2]) if mask is None else mask
        _, embeds = self.encode_windows(input_features[mask.bool()].unsqueeze(1))
        total = embeds.new_zeros(*mask.shape, embeds.shape[-1])
        total[mask.bool()] = embeds
        return F.normalize(total.sum(dim=1), dim=-1)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ClapOutput:
        """Similarities of clips and texts; for the arguments see `get_audio_features` and `encode_text`."""
        texts = self.encode_text(input_ids, attention_mask)
        audio = self.get_audio_features(input_features, input_features_mask)
        return ClapOutput(
            logits_per_audio=audio @ texts.T * self.logit_scale_a.exp(),
            logits_per_text=texts @ audio.T * self.logit_scale_t.exp(),
            text_embeds=texts,
            audio_embeds=audio,
        )


def _holds_sound(features: torch.Tensor) -> torch.Tensor:
    """`(..., n, d)` -> `(..., n, 1)`, 1 for patches with sound: their features are not all zero."""
    return (features != 0).any(dim=-1, keepdim=True).to(features.dtype)


def _scaled(channels: int, config: MobileNetClapConfig) -> int:
    return max(8, round(channels * config.width_multiplier))


__all__ = ["MobileNetClapConfig", "MobileNetClapModel"]
