"""YAMNet's TFLite file (Google, Apache-2.0) into a `MobileNetClapModel` whose text tower is untrained."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapConfig, MobileNetClapModel

from .output import finished_folder
from .state_dicts import ConversionError

# The published file rounds weights and activations to 8 bits: float32 arithmetic gives the same first class in about
# 95 % of patches. A wrong layer, stride or filter leaves next to nothing of that.
MIN_AGREEMENT, MAX_DIFFERENCE = 0.8, 0.08
_MAX_PATCHES = 200


def convert_yamnet(source: str | Path, out: str | Path, *, recordings: Sequence, overwrite: bool = False) -> dict:
    """Writes a folder with the model and its feature extractor, after comparing it with the file.

    Args:
        source: the TFLite file of YAMNet for classification (15,600 samples at 16 kHz -> 521 scores).
        out: the folder to make.
        recordings: audio files on which both must agree.
        overwrite: replace a folder that is there.

    Returns:
        `dict`: `patches` compared, `same_first_class` (share), `mean_largest_difference` (of scores), `parameters`.

    Raises:
        ConversionError: if the file is not YAMNet's, or the converted model disagrees with it.
        ImportError: without ai-edge-litert.
    """
    interpreter = _interpreter(source)
    state, names = _state_dict(interpreter), _class_names(source)
    labels = dict(enumerate(names))
    config = MobileNetClapConfig(id2label=labels, label2id={name: number for number, name in labels.items()})
    model = MobileNetClapModel(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name.startswith(("audio_model.", "classifier."))]
    if missing or unexpected:
        raise ConversionError(f"{source}: not YAMNet's layers: missing {missing}, unexpected {unexpected}")
    extractor = RecapFeatureExtractor(**MobileNetClapModel.feature_settings(config))
    report = _compare(model, extractor, interpreter, recordings)
    if report["same_first_class"] < MIN_AGREEMENT or report["mean_largest_difference"] > MAX_DIFFERENCE:
        wanted = f"the same first class in at least {MIN_AGREEMENT:.0%} of patches and a difference of at most "
        problem = f"{source}: the converted model disagrees with it: {report}"
        raise ConversionError(f"{problem}; expected {wanted}{MAX_DIFFERENCE}")
    with finished_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
    return {**report, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def _interpreter(source: str | Path) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError("Reading a TFLite file needs ai-edge-litert: pip install recap-hf[yamnet]") from error
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    try:
        interpreter = Interpreter(str(source))
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"{source}: not a TFLite model: {error}") from error
    shapes = [part()[0]["shape"].tolist() for part in (interpreter.get_input_details, interpreter.get_output_details)]
    if shapes != [[15600], [1, 521]]:
        hint = f"expected YAMNet for classification, from (15600,) to (1, 521), found {shapes[0]} to {shapes[1]}"
        raise ConversionError(f"{source}: {hint}")
    return interpreter


def _class_names(source: str | Path) -> list[str]:
    """The class names, which the published file carries as an attached text."""
    try:
        with zipfile.ZipFile(source) as attached:
            names = attached.read("yamnet_label_list.txt").decode().splitlines()
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConversionError(f"{source}: the list of classes (yamnet_label_list.txt) is not attached") from error
    return names


def _state_dict(interpreter: Any) -> dict[str, torch.Tensor]:
    """Weights and biases in float32. The order of tensors in the file is the order of the layers."""
    weights, biases = [], []
    for detail in interpreter.get_tensor_details():
        quantization = detail["quantization_parameters"]
        scales, zeros, axis = (quantization[name] for name in ("scales", "zero_points", "quantized_dimension"))
        is_bias = detail["dtype"] == np.int32 and len(scales) >= 1
        if not is_bias and (detail["dtype"] != np.int8 or len(scales) < 2):
            continue
        try:
            stored = interpreter.get_tensor(detail["index"])
        except ValueError:
            continue  # an activation
        shape = [-1 if dim == axis else 1 for dim in range(stored.ndim)]
        (biases if is_bias else weights).append((stored - zeros.reshape(shape)) * scales.reshape(shape))
    state = {}
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = "classifier"
        if weight.ndim == 4:
            name = f"audio_model.layers.{number}.convolution"
            # (outputs, height, width, inputs), or (1, height, width, channels) for a depthwise convolution.
            weight = weight.transpose((3, 0, 1, 2) if weight.shape[0] == 1 else (0, 3, 1, 2))
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
        state[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))
    return state


@torch.no_grad()
def _compare(model: Any, extractor: Any, interpreter: Any, recordings: Sequence[str | Path]) -> dict[str, Any]:
    given, returned = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    same, largest = [], []
    for samples in _patches(recordings, extractor.sampling_rate):
        interpreter.set_tensor(given, samples)
        interpreter.invoke()
        theirs = interpreter.get_tensor(returned)[0]
        ours = model.classifier(model.audio_model(extractor.log_mel(samples)[None]))[0].sigmoid().numpy()
        same.append(theirs.argmax() == ours.argmax())
        largest.append(np.abs(theirs - ours).max())
    if not same:
        raise ConversionError("no recording of at least 0.975 s to compare on: give some")
    share, difference = (round(float(np.mean(each)), 4) for each in (same, largest))
    return {"patches": len(same), "same_first_class": share, "mean_largest_difference": difference}


def _patches(recordings: Sequence[str | Path], rate: int, length: int = 15_600) -> Iterator[np.ndarray]:
    found = 0
    for path in recordings:
        waveform, own_rate = load_audio(path)
        waveform = resample(to_mono(waveform), own_rate, rate)
        for start in range(0, len(waveform) - length + 1, length):
            if found == _MAX_PATCHES:
                return
            found += 1
            yield waveform[start : start + length]
