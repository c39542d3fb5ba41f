"""Flags that the commands share. Nothing here imports torch, so that a wrong call is reported at once."""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from recap_cli.numbers import positive

_SMALL_MODEL = 20_000_000
DTYPES = ("float32", "bfloat16", "float16", "int8")


@functools.cache
def _caption_options() -> ModuleType:
    """The module of `CaptionOptions`, read from its file: importing it by name imports all of recap_hf, and torch."""
    root = Path(__file__).resolve().parent.parent
    # Installed, and in a checkout.
    path = next(path for path in (root / "recap_hf" / "modeling", root / "modeling") if path.is_dir())
    spec = importlib.util.spec_from_file_location("recap_cli._caption_options", path / "options_recap.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `CaptionOptions`: `--num-beams N`, in one group for each group of options."""
    module, groups = _caption_options(), {}
    for option in fields(module.CaptionOptions):
        data = option.metadata
        if data["group"] not in groups:
            groups[data["group"]] = parser.add_argument_group(f"{data['group']} (default: the model's)")
        settings: dict[str, Any] = {"help": data["help"]}
        if data["kind"] is bool:
            settings |= {"action": argparse.BooleanOptionalAction, "default": None}
        else:
            settings |= {"type": _option_type(module, option.name, data), "choices": data.get("choices")}
            settings["metavar"] = None if "choices" in data else ("N" if data["kind"] is int else "X")
        groups[data["group"]].add_argument("--" + option.name.replace("_", "-"), **settings)


def _option_type(module: ModuleType, name: str, data: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return module.CaptionOptions.check(name, data["kind"](text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {module.expected(data)}, got {text!r}") from None

    return parse


def caption_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `CaptionOptions` among parsed arguments, `None` for those that are not set."""
    return {name: getattr(args, name, None) for name in _caption_options().CaptionOptions.names()}


def check_caption_options(args: argparse.Namespace) -> None:
    """Refuses caption options that contradict each other.

    Raises:
        `ValueError`
    """
    _caption_options().CaptionOptions(**caption_values(args))


def add_captioner_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--datastore`, `--device`, `--dtype`, and the caption options in groups of their own."""
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the one in the package)")
    text = "captions to retrieve from: a datastore, milvus:URI#COLLECTION, or a .txt, .csv, .json or .jsonl file"
    parser.add_argument("--datastore", metavar="CAPTIONS", help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; int8 on CPUs only")
    add_threads(parser)
    add_caption_options(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`."""
    text = "of the CPU that the model uses (default: 1 for a small model, else one for each core)"
    parser.add_argument("--threads", type=positive, metavar="N", help=text)


def set_threads(args: argparse.Namespace, model: Any) -> None:
    """Sets the number of threads of this process. Small matrices are slower on several threads where other processes
    use the cores, too: each step waits for the last thread."""
    import torch

    small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL_MODEL
    if args.threads or small:
        torch.set_num_threads(args.threads or 1)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """`--engine ray` and what it takes."""
    group = parser.add_argument_group("engine")
    text = "ray: parts of the work by several processes"
    group.add_argument("--engine", choices=("local", "ray"), default="local", help=text)
    group.add_argument("--num-workers", type=positive, default=2, metavar="N", help="processes of Ray (default: 2)")
    group.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster; auto: this machine's")


def be_quiet() -> None:
    """Bars, hints and notes of each retry would stand between results on a terminal. This process is the command's
    own."""
    import huggingface_hub
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()


def load_captioner(args: argparse.Namespace) -> Any:
    """The `Captioner` that the arguments of `add_captioner_arguments` name, its weights laid out for a CPU.

    Raises:
        `OSError`: if there is no such checkpoint. `ValueError`: for a wrong combination of arguments.
    """
    from recap_hf.fast_generation import prepare_for_cpu
    from recap_hf.modeling.captioning_recap import Captioner
    from recap_hf.modeling.options_recap import CaptionOptions

    be_quiet()
    dtype = "float32" if args.dtype == "int8" else args.dtype
    options = CaptionOptions(**caption_values(args))
    captioner = Captioner.from_pretrained(args.model, device=args.device, dtype=dtype, options=options)
    set_threads(args, captioner.model)
    if captioner.model.device.type == "cpu" and args.dtype != "float16":
        prepare_for_cpu(captioner.model, args.dtype)
    elif args.dtype == "int8":
        raise ValueError(f"--dtype int8 is for CPUs and the model is on {captioner.model.device}: use bfloat16.")
    return captioner if args.datastore is None else captioner.with_datastore(args.datastore)
