"""`recap train`: a captioner from recordings and captions."""

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Sequence

from recap_cli.status import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap train`: every field of `CaptionerTrainingConfig`."""
    from recap_hf.training.config import add_config_arguments
    from recap_hf.training.tasks.captioner import CaptionerTrainingConfig

    add_config_arguments(parser, CaptionerTrainingConfig)
    parser.set_defaults(settings=CaptionerTrainingConfig)


def run(args: argparse.Namespace) -> int:
    """Train what the arguments describe: settings of the class `args.settings`.

    With `--num-processes` torch's launcher starts the processes. Threads, log and environment of each are set for the
    run.

    Raises:
        ValueError: if there are too few GPUs. RuntimeError: if one of the processes fails.
    """
    import datasets
    import torch
    import transformers

    from recap_hf.training.config import load_config
    from recap_hf.training.run import train

    config = load_config(args, args.settings)
    count, devices = config.num_processes, 0 if config.device == "cpu" else torch.cuda.device_count()
    if count > 1 and "WORLD_SIZE" not in os.environ:
        if 0 < devices < count:
            raise ValueError(f"--num-processes {count}, but there are {devices} GPUs: give --device cpu, or {devices}")
        os.environ.setdefault("OMP_NUM_THREADS", str(1 if devices else max(1, (os.cpu_count() or 1) // count)))
        return _run_in_processes(args.argv, count)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    # Workers of the data loader are forked; a tokenizer's threads do not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("recap_hf").setLevel(logging.INFO if is_main else logging.ERROR)
    if not is_main or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    train(config)
    return EXIT_OK


def _run_in_processes(argv: Sequence[str], count: int) -> int:
    """Runs this command in `count` processes, as `torchrun --standalone` does, which prints a traceback of its own
    where one of them has said what is wrong."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(uuid.uuid4()), "max_restarts": 0}
    try:
        elastic_launch(LaunchConfig(1, 1, count, **settings), sys.executable)("-m", "recap_cli", *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RuntimeError(f"process {rank} of {count} ended with exit code {failure.exitcode}") from error
    except SignalException as error:
        raise KeyboardInterrupt from error
    return EXIT_OK
