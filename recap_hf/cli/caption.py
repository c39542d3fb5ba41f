"""`recap caption`: recordings in, captions out."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Any

from recap_hf.cli.choice import add_choice_arguments
from recap_hf.cli.decoding import add_reading_arguments, add_rerank_arguments, decoding_options, rerank_error
from recap_hf.cli.numbers import count, positive
from recap_hf.ray_engine import add_engine_arguments
from recap_hf.timeline.options import FORMATS, add_timeline_arguments, usage_error

_CSV_COLUMNS = ("file", "caption", "score", "retrieved", "error", "confidence", "similarity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE|FOLDER|GLOB|URL|-", help="recordings; - reads one from standard input"
    )
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the embedded recap-tiny)")
    parser.add_argument(
        "--datastore",
        help="captions to retrieve from: a datastore, milvus:URI#COLLECTION, or a .txt, .csv, .json or .jsonl file of "
        "captions; what of them the embedded recap-tiny can hear tells `recap tiny sounds --datastore FILE`",
    )
    parser.add_argument("--k", type=count, help="captions in the prompt (default: the model's, 4 in the paper)")
    add_choice_arguments(parser, "retrieval-")
    parser.add_argument("--num-beams", type=positive, help="beams of the search (default: the model's)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest caption in tokens (default: the model's, 60)")
    add_rerank_arguments(parser)
    add_reading_arguments(parser)
    parser.add_argument("--do-sample", action="store_true", help="sample captions instead of searching with beams")
    parser.add_argument("--batch-size", type=positive, default=8, help="recordings per pass (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="of the weights; int8 is for the CPU, where it and bfloat16 are fastest (default: %(default)s)",
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="record decode steps and replay them: for many recordings on a GPU"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="those after csv with --timeline alone; default: %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")
    add_timeline_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--part-size",
        type=positive,
        default=64,
        help="recordings a part, rounded up to four batches (default: %(default)s)",
    )
    parser.add_argument(
        "--work-dir", metavar="DIR", help="of what is done so far, with --engine ray (default: beside --output)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was captioned, 1 if some could not be, 2 if nothing was found to caption."""
    from recap_hf.captioning import expand_inputs

    try:
        names = expand_inputs(args.inputs)
    except ValueError as error:
        print(f"recap caption: error: {error}", file=sys.stderr)
        return 2
    wrong = usage_error(args, len(names))
    wrong = wrong or rerank_error(args)
    if wrong is not None:
        print(f"recap caption: error: {wrong}", file=sys.stderr)
        return 2
    if args.timeline:
        from recap_hf.timeline.command import run_timeline

        return run_timeline(args, names, load_captioner)
    entries = _captioned(args, names)
    failed = 0
    # What keeps a run from beginning is known with the first recording: only then is an older output replaced.
    first = list(islice(entries, 1))
    with _output(args.output) as file, _progress(len(names)) as progress:
        writer = _WRITERS[args.format](file)
        for entry in chain(first, entries):
            if entry.error is not None:
                failed += 1
                progress.write(f"recap caption: {entry.name}: {entry.error}")
            writer.write(entry)
            progress.update(1)
        writer.close()
    if failed:
        print(f"recap caption: {failed} of {len(names)} recordings could not be captioned.", file=sys.stderr)
    return 1 if failed else 0


def _captioned(args: argparse.Namespace, names: list[str]) -> Iterator[Any]:
    if args.engine == "ray":
        from recap_hf.ray_engine import caption_files_with_ray

        return caption_files_with_ray(args, names, lambda message: print(message, file=sys.stderr))
    from recap_hf.captioning import caption_files

    return caption_files(load_captioner(args), names, args.batch_size)


def load_captioner(args: argparse.Namespace) -> Any:
    """The pipeline that the options `--model`, `--datastore`, `--device`, `--dtype` and the decoding options name."""
    from recap_hf.quick_start import quick_start

    with quick_start():
        from recap_hf.inference import prepare_for_cpu, prepare_for_gpu
        from recap_hf.loading import load_pair
        from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline
        from recap_hf.modeling.processing_recap import RecapProcessor  # noqa: F401

    dtype = "float32" if args.dtype == "int8" else args.dtype
    model, processor = load_pair(args.model, args.device, dtype, quiet=True)
    if model.device.type == "cpu" and args.dtype != "float16":
        prepare_for_cpu(model, args.dtype)
    elif args.dtype == "int8":
        raise ValueError(f"--dtype int8 is for the CPU and the model is on {model.device}: use bfloat16 there.")
    if getattr(args, "cuda_graphs", False):
        prepare_for_gpu(model)
    decoding = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens, "k": args.k}
    # Not all commands that caption have these.
    decoding |= {"do_sample": getattr(args, "do_sample", None) or None} | decoding_options(args)
    decoding |= {name: getattr(args, name, None) for name in ("retrieval_diversity", "retrieval_score_drop")}
    return AudioCaptioningPipeline(
        model=model,
        processor=processor,
        datastore=args.datastore,
        device=args.device,
        **{key: value for key, value in decoding.items() if value is not None},
    )


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        yield file


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    # `disable=None` shows the bar on a terminal alone; results go to standard output, the bar to standard error.
    with tqdm(total=total, unit="clip", disable=None if total > 1 else True, file=sys.stderr, leave=False) as bar:
        bar.write = _write_to_stderr
        yield bar


def _write_to_stderr(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


class _TextWriter:
    """A caption a file, and under it what it was prompted with."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, entry: Any) -> None:
        if entry.result is None:
            return
        confidence = entry.result.get("confidence")
        sure = "" if confidence is None else f" ({confidence:.0%} sure)"
        lines = [f"{entry.name}: {entry.result['caption']}{sure}"]
        lines += [f"    {hit['score']:.2f}  {' '.join(hit['caption'].split())}" for hit in entry.result["retrieved"]]
        self._print("\n".join(lines) + "\n")

    def _print(self, text: str) -> None:
        # At once: whoever reads along, or interrupts, has what is done.
        self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        """Nothing stands open."""


class _JsonlWriter(_TextWriter):
    """An object a line, failures included."""

    def write(self, entry: Any) -> None:
        self._print(json.dumps(_as_object(entry), ensure_ascii=False) + "\n")


class _JsonWriter(_TextWriter):
    """One list of objects, written as they come."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self.separator = "[\n"

    def write(self, entry: Any) -> None:
        self._print(self.separator + json.dumps(_as_object(entry), ensure_ascii=False))
        self.separator = ",\n"

    def close(self) -> None:
        self._print("[]\n" if self.separator == "[\n" else "\n]\n")


class _CsvWriter(_TextWriter):
    """A row a file; the retrieved captions as JSON in their cell."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self.rows = csv.DictWriter(file, _CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        self.rows.writeheader()

    def write(self, entry: Any) -> None:
        row = _as_object(entry)
        if "retrieved" in row:
            row["retrieved"] = json.dumps(row["retrieved"], ensure_ascii=False)
        self.rows.writerow(row)
        self.file.flush()


def _as_object(entry: Any) -> dict[str, Any]:
    return {"file": entry.name, **(entry.result or {"error": entry.error})}


_WRITERS = {"text": _TextWriter, "json": _JsonWriter, "jsonl": _JsonlWriter, "csv": _CsvWriter}
