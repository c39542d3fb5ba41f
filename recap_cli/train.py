"""`recap train`: a captioner from recordings and captions."""

import argparse
import logging
import os
import subprocess
import sys

from recap_cli.status import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap train`: every field of `CaptionerTrainingConfig`."""
    from recap_hf.training.config import add_config_arguments
    from recap_hf.training.tasks.captioner import CaptionerTrainingConfig

    add_config_arguments(parser, CaptionerTrainingConfig)
    parser.set_defaults(settings=CaptionerTrainingConfig)


def run(args: argparse.Namespace) -> int:
    """Train what the arguments describe: settings of the class `args.settings`.

    With `--num-processes` torchrun starts the processes. Threads, log and environment of each are set for the run.

    Raises:
        ValueError: if there are too few GPUs.
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
        threads = 1 if devices else max(1, (os.cpu_count() or 1) // count)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        return subprocess.call([*command, "-m", "recap_cli", *args.argv], env=environment)
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
