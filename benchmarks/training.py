"""Training speed beside the authors' way of training, in one run, on real captions and full-size random weights.

    python -m benchmarks.training clotho_captions.csv audiocaps_train.csv [--device cuda] [--reference-passes 8]

The reference step is what `train.py` of the authors' repository amounts to (Sreyan88/RECAP, commit 832ad8a): every
example padded to the longest possible length, no mask, logits and loss over the whole length, SDPA, plain AdamW. Ours
is this package's step on batches of the same size. Optimiser steps included on both sides, data preparation too.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.training.collator import (
    Batch,
    CaptionCollator,
    PromptedCaptions,
    PromptOptions,
    with_targets,
)
from recap_hf.training.data import Clip
from recap_hf.training.loss import CaptionLoss, fuse_activations
from recap_hf.training.neighbours import Neighbours
from recap_hf.training.plans import Row, plan_epoch
from recap_hf.training.task import Key

# Captions of the authors' code have at most 60 tokens, in the prompt as in the target.
LONGEST_CAPTION = 60
# Byte-level BPE of so many tokens, trained on the captions themselves, where GPT-2's own tokenizer is not at hand:
# 13.6 tokens per caption of Clotho development and 9.6 of AudioCaps, where GPT-2's has 13.3 and 10.1.
_OWN_TOKENS = 6_000


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure.

    Args:
        captions: CSV files with a column for the clip and one named `caption`.
        tokenizer: folder or Hub id of GPT-2's tokenizer; empty trains one on the captions.
        batch_size: captions in a step, on both sides.
        k: captions in a prompt.
        dtypes: of our side: "fp32", "bf16". The reference is fp32 on a CPU; on a GPU it is measured in both.
        steps: steps of ours to time, for each mode and dtype.
        reference_steps: steps of the reference to time; ours are run between them.
        reference_passes: passes in which the reference accumulates its step, where its memory does not suffice.
        seed: of weights and order.
        device: "cpu" or "cuda".
        width, layers, heads, vocabulary: of the decoder; GPT-2 small by default.
    """

    captions: tuple[str, ...]
    tokenizer: str = ""
    batch_size: int = 32
    k: int = 4
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    steps: int = 6
    reference_steps: int = 2
    reference_passes: int = 1
    seed: int = 0
    device: str = "cpu"
    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 50_257


@dataclass
class Measurement:
    """One side: seconds of each step, by the clock and of processor time, and highest memory in GB (None: unknown)."""

    name: str
    dtype: str
    captions: int = 0
    tokens: int = 0
    padding: int = 0
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_gb: float | None = None
    loss: float = math.nan
    reference_loss: float = math.nan

    @property
    def captions_per_s(self) -> float:
        """Captions trained on in a second."""
        return self.captions / sum(self.step_s) if self.step_s else math.nan

    @property
    def captions_per_cpu_s(self) -> float:
        """Captions in a second of processor time, over all threads: what is left to compare on a busy machine."""
        return self.captions / sum(self.cpu_s) if self.cpu_s else math.nan

    @property
    def loss_difference(self) -> float:
        """Relative difference to the reference's loss on the same captions and prompts."""
        return abs(self.loss - self.reference_loss) / self.reference_loss


class RandomFeatures:
    """Hidden states of the real shape (64 positions of a window), drawn by clip instead of encoded."""

    def __init__(self, width: int = 768, positions: int = 64) -> None:
        self.shape = (1, positions, width)

    def read(self, key: str, name: str) -> np.ndarray:
        """fp16 array of shape `(1, positions, d)`."""
        return np.random.default_rng(int(key)).standard_normal(self.shape, dtype=np.float32).astype(np.float16)


def run_benchmark(options: BenchmarkOptions, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure every caption file; plain data (see `format_table`)."""
    device = torch.device(options.device)
    results = []
    for path in options.captions:
        clips = read_clips(path)
        processor = make_processor([text for _, texts in clips for text in texts], options)
        model = make_model(options, processor).to(device)
        examples = make_examples(clips, processor, options)
        results.append({"captions": Path(path).name, **_measure_file(model, examples, processor, options, note)})
    return {
        "options": asdict(options),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "results": results,
    }


def _measure_file(
    model: Any, examples: PromptedCaptions, processor: Any, options: BenchmarkOptions, note: Callable[[str], None]
) -> dict[str, Any]:
    shared = max(len(clip.captions) for clip in examples.clips) > 1
    modes = [("ours", False)] + ([("ours, shared prompt", True)] if shared else [])
    plans = {name: _chosen_steps(examples, options, share) for name, share in modes}
    longest = reference_length(processor, options.k)
    dtypes = options.dtypes if options.device != "cpu" else ("fp32",)
    references = [Measurement("reference", dtype) for dtype in dtypes]
    ours = [(Measurement(name, dtype), plans[name]) for name, _ in modes for dtype in options.dtypes]
    for name, plan in plans.items():
        rows = plan[len(plan) // 2]
        expected = _stock_loss(model, examples, processor, rows, longest, options)
        for measurement in (measurement for measurement, _ in ours if measurement.name == name):
            measurement.reference_loss = expected
            measurement.loss = _our_loss(model, examples, measurement.dtype, rows, options.device)
            note(f"{name} {measurement.dtype}: relative loss difference {measurement.loss_difference:.1e}")
    for number in range(options.reference_steps):
        for reference in references:
            rows = plans["ours"][number % len(plans["ours"])]
            step = reference_step(model, examples, processor, longest, options, reference)
            _timed(reference, lambda step=step, rows=rows: step(rows), rows, options.device)
            note(f"reference {reference.dtype}: step of {reference.step_s[-1]:.1f} s")
        for measurement, plan in ours:
            step = our_step(model, examples, options, measurement)
            # Each round takes its share of the steps: both sides see the same minutes of the machine.
            for rows in plan[number :: options.reference_steps]:
                _timed(measurement, lambda step=step, rows=rows: step(rows), rows, options.device)
            note(f"{measurement.name} {measurement.dtype}: {measurement.captions_per_s:.2f} captions/s")
    measured = [*references, *(measurement for measurement, _ in ours)]
    base = {reference.dtype: reference for reference in references}
    return {
        "clips": len(examples.clips),
        "tokens_per_caption": round(_mean([len(t) - 1 for clip in examples.clips for t in clip.targets]), 2),
        "reference_length": longest,
        "settings": [_row(measurement, base.get(measurement.dtype, base["fp32"])) for measurement in measured],
    }


def _row(measurement: Measurement, base: Measurement) -> dict[str, Any]:
    row = {
        "side": measurement.name,
        "dtype": measurement.dtype,
        "captions_per_s": round(measurement.captions_per_s, 4),
        "ratio": round(measurement.captions_per_s / base.captions_per_s, 2),
        "cpu_ratio": round(measurement.captions_per_cpu_s / base.captions_per_cpu_s, 2),
        "steps": len(measurement.step_s),
        "seconds_per_step": [round(seconds, 6) for seconds in measurement.step_s],
        "cpu_seconds_per_step": [round(seconds, 6) for seconds in measurement.cpu_s],
        "peak_gb": measurement.peak_gb and round(measurement.peak_gb, 2),
    }
    if measurement.name != "reference":
        row["padding_share"] = round(measurement.padding / (measurement.tokens + measurement.padding), 4)
        row["loss"] = measurement.loss
        row["reference_loss"] = measurement.reference_loss
        row["loss_difference"] = measurement.loss_difference
    return row


def _chosen_steps(examples: PromptedCaptions, options: BenchmarkOptions, share_prompts: bool) -> list[list[Row]]:
    """Full steps of an epoch, evenly spaced over all of its lengths, in random order."""
    lengths = examples.prompt_lengths()
    plan = plan_epoch(examples.clips, lengths, options.batch_size, options.seed, 0, share_prompts=share_prompts)
    plan = [rows for rows in plan if sum(len(row.captions) for row in rows) == options.batch_size]
    plan.sort(key=lambda rows: sum(lengths[row.clip] for row in rows) / len(rows))
    count = max(options.steps, options.reference_steps)
    # The middles of `count` equal shares: the mean over them is the mean over the epoch.
    chosen = [plan[int((number + 0.5) * len(plan) / count)] for number in range(count)]
    return [chosen[position] for position in np.random.default_rng(options.seed).permutation(count)]


def make_batch(examples: PromptedCaptions, rows: list[Row]) -> Batch:
    """The batch of some rows."""
    return CaptionCollator(examples.processor.tokenizer.pad_token_id)([examples[Key(row)] for row in rows])


def _our_loss(model: Any, examples: PromptedCaptions, dtype: str, rows: list[Row], device: str) -> float:
    """Mean loss of a batch's caption tokens by our step."""
    fuse_activations(model.decoder)
    with torch.no_grad(), _autocast(device, dtype):
        return float(CaptionLoss(model.decoder)(make_batch(examples, rows).to(device, torch.float32)).mean())


def _stock_loss(
    model: Any, examples: PromptedCaptions, processor: Any, rows: list[Row], longest: int, options: BenchmarkOptions
) -> float:
    """The same by the stock forward in float32, padded as the reference pads."""
    _stock_activations(model.decoder)
    total = tokens = 0.0
    with torch.no_grad():
        for group in _passes(_examples(rows), max(4, options.reference_passes)):
            loss, count = _reference_loss(model, examples, processor, group, longest, options.device)
            total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


def our_step(
    model: Any, examples: PromptedCaptions, options: BenchmarkOptions, measurement: Measurement
) -> Callable[[list[Row]], None]:
    """This package's step: batch, forward, backward, clip, optimiser."""
    parameters = model.cross_attention_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, fused=True)
    loss_module = CaptionLoss(model.decoder)

    def step(rows: list[Row]) -> None:
        fuse_activations(model.decoder)
        batch = make_batch(examples, rows)
        measurement.tokens += int((batch.segments >= 0).sum())
        measurement.padding += int((batch.segments < 0).sum())
        with _autocast(options.device, measurement.dtype):
            losses = loss_module(batch.to(options.device, torch.float32))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reference_step(
    model: Any,
    examples: PromptedCaptions,
    processor: Any,
    longest: int,
    options: BenchmarkOptions,
    measurement: Measurement,
) -> Callable[[list[Row]], None]:
    """The authors' step."""
    parameters = model.cross_attention_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, foreach=False, fused=False)

    def step(rows: list[Row]) -> None:
        _stock_activations(model.decoder)
        groups = _passes(_examples(rows), options.reference_passes)
        for group in groups:
            with _autocast(options.device, measurement.dtype):
                loss, _ = _reference_loss(model, examples, processor, group, longest, options.device)
            (loss / len(groups)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _reference_loss(
    model: Any, examples: PromptedCaptions, processor: Any, rows: list[Row], longest: int, device: str
) -> tuple[torch.Tensor, int]:
    """Mean loss over the caption tokens, and their number; every example as long as the longest could be."""
    from recap_hf import RecapEncoderOutput

    retrieved = [examples.retrieved(row, 0) for row in rows]
    captions = [examples.clips[row.clip].captions[row.captions[0]] for row in rows]
    inputs = processor.build_training_inputs(retrieved, captions, LONGEST_CAPTION)
    missing = longest - inputs["decoder_input_ids"].shape[1]
    pad = processor.tokenizer.pad_token_id
    ids = torch.nn.functional.pad(inputs["decoder_input_ids"], (0, missing), value=pad).to(device)
    labels = torch.nn.functional.pad(inputs["labels"], (0, missing), value=-100).to(device)
    states = np.stack([examples.features.read(examples.clips[row.clip].key, "states")[0] for row in rows])
    encoding = RecapEncoderOutput(last_hidden_state=torch.from_numpy(states).to(device).float())
    loss = model(encoder_outputs=encoding, decoder_input_ids=ids, labels=labels, use_cache=False).loss
    return loss, int((labels != -100).sum())


def _stock_activations(decoder: Any) -> None:
    from transformers.activations import ACT2FN

    for block in decoder.transformer.h:
        block.mlp.act = ACT2FN[decoder.config.activation_function]


def reference_length(processor: Any, k: int) -> int:
    """Tokens of the longest possible example: the template, k captions and the target of 60 tokens each."""
    template = processor.tokenizer(processor.prompt.template.replace("{captions}", ""))["input_ids"]
    return len(template) + (k + 1) * LONGEST_CAPTION


def _examples(rows: Sequence[Row]) -> list[Row]:
    """One example per caption, as the authors have them."""
    return [Row(row.clip, (caption,)) for row in rows for caption in row.captions]


def _passes(examples: list[Row], passes: int) -> list[list[Row]]:
    size = math.ceil(len(examples) / passes)
    return [examples[start : start + size] for start in range(0, len(examples), size)]


# --------------------------------------------------------------- the material


def read_clips(path: str) -> list[tuple[str, list[str]]]:
    """(clip id, captions) of a CSV file.

    Raises:
        ValueError: where it has no column for clip or caption.
    """
    from recap_hf.data.files import read_table

    table = read_table(path, {"caption": "a caption"})
    names = ("clip_id", "file_name", "file_path", "youtube_id")
    column = next((name for name in names if name in table[0]), None)
    if column is None:
        raise ValueError(f"{path}: expected a column for the clip, one of {', '.join(names)}")
    clips: dict[str, list[str]] = {}
    for row in table:
        if row["caption"]:
            clips.setdefault(row[column], []).append(row["caption"])
    return list(clips.items())


def make_examples(clips: list[tuple[str, list[str]]], processor: Any, options: BenchmarkOptions) -> PromptedCaptions:
    """Batches of the clips, prompted with k captions of other clips (drawn: there is no audio to retrieve with)."""
    rng = np.random.default_rng(options.seed)
    captions = [text for _, texts in clips for text in texts]
    owner = np.repeat(np.arange(len(clips)), [len(texts) for _, texts in clips])
    rows = np.empty((len(clips), options.k), dtype=np.int32)
    for clip in range(len(clips)):
        drawn = rng.choice(len(captions), size=options.k + 16, replace=False)
        rows[clip] = drawn[owner[drawn] != clip][: options.k]
    made = [Clip(name, texts, key=str(number)) for number, (name, texts) in enumerate(clips)]
    made = with_targets(made, processor, LONGEST_CAPTION)
    return PromptedCaptions(
        made, RandomFeatures(), processor, [Neighbours(rows, captions)], PromptOptions(options.k, seed=options.seed)
    )


def make_processor(captions: list[str], options: BenchmarkOptions) -> Any:
    """A processor with GPT-2's tokenizer where it is given, else with one trained on the captions."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from recap_hf import RecapConfig, RecapProcessor

    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_train_tokenizer(captions), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
        )
    return RecapProcessor.from_config(RecapConfig(), tokenizer, tokenizer)


def _train_tokenizer(captions: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_OWN_TOKENS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def make_model(options: BenchmarkOptions, processor: Any) -> Any:
    """A captioner with a random decoder of full size, frozen but for the cross-attention; its CLAP is never run."""
    from transformers import ClapConfig, GPT2Config

    from recap_hf import RecapConfig, RecapForConditionalGeneration

    torch.manual_seed(options.seed)
    eos = processor.tokenizer.eos_token_id
    decoder = GPT2Config(
        vocab_size=options.vocabulary,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        bos_token_id=eos,
        eos_token_id=eos,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    # The smallest CLAP with hidden states of the real width: features are drawn, not encoded.
    clap = ClapConfig(
        audio_config={"patch_embeds_hidden_size": 96, "depths": [1, 1, 1, 1]},
        text_config={"num_hidden_layers": 1, "vocab_size": 100},
    )
    model = RecapForConditionalGeneration(RecapConfig(clap=clap, decoder=decoder))
    model.set_attn_implementation("sdpa")
    model.freeze_base()
    return model.train()


# ------------------------------------------------------------------ measuring


def _timed(measurement: Measurement, step: Callable[[], None], rows: list[Row], device: str) -> None:
    gc.collect()
    reset_peak(device)
    started, processor_started = time.perf_counter(), time.process_time()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    measurement.step_s.append(time.perf_counter() - started)
    measurement.cpu_s.append(time.process_time() - processor_started)
    measurement.captions += sum(len(row.captions) for row in rows)
    peak = peak_gb(device)
    if peak is not None:
        measurement.peak_gb = max(peak, measurement.peak_gb or 0.0)


def reset_peak(device: str) -> None:
    """Forget the highest memory so far: the GPU's, or on Linux the process's."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: str) -> float | None:
    """Highest memory since `reset_peak` in GB, None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 / 1e9 if match else None


def _autocast(device: str, dtype: str) -> Any:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def format_table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    machine, options = report["machine"], report["options"]
    yield (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; batches of "
        f"{options['batch_size']} captions, k = {options['k']}, {options['layers']} layers of width {options['width']}"
    )
    for result in report["results"]:
        yield ""
        yield (
            f"{result['captions']}: {result['clips']:,} clips, {result['tokens_per_caption']} tokens per caption; "
            f"the reference pads to {result['reference_length']} tokens"
        )
        heads = f"{'captions/s':>11}{'ratio':>8}{'by CPU time':>13}{'peak GB':>9}{'padding':>9}"
        yield f"{'':28}{heads}{'loss difference':>17}"
        for row in result["settings"]:
            peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
            padding = f"{row['padding_share']:.1%}" if "padding_share" in row else ""
            difference = f"{row['loss_difference']:.1e}" if "loss_difference" in row else ""
            yield (
                f"{row['side'] + ', ' + row['dtype']:28}{row['captions_per_s']:>11.3f}{row['ratio']:>8.2f}"
                f"{row['cpu_ratio']:>13.2f}{peak:>9}{padding:>9}{difference:>17}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("captions", nargs="+", metavar="FILE", help="CSV with a column for the clip and one 'caption'")
    parser.add_argument("--tokenizer", default="", help="GPT-2's tokenizer (default: one trained on the captions)")
    parser.add_argument("--batch-size", type=int, default=32, help="captions in a step (default: 32)")
    parser.add_argument("--k", type=int, default=4, help="captions in a prompt (default: 4)")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="of our side")
    parser.add_argument("--steps", type=int, default=6, help="steps of ours to time, per setting (default: 6)")
    parser.add_argument("--reference-steps", type=int, default=2, help="steps of the reference (default: 2)")
    parser.add_argument(
        "--reference-passes", type=int, default=1, help="passes of the reference's step (17 GB of memory in one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: 12, as GPT-2 small)")
    parser.add_argument("--width", type=int, default=768, help="of the decoder (default: 768)")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    args = vars(parser.parse_args(argv))
    output = args.pop("output")
    options = BenchmarkOptions(**args | {name: tuple(dict.fromkeys(args[name])) for name in ("captions", "dtypes")})
    report = run_benchmark(options, note=lambda text: print(text, file=sys.stderr, flush=True))
    if output:
        Path(output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n".join(format_table(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
