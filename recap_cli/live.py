"""`recap live`: captions of sound as it arrives, from a pipe or a microphone."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from recap_cli.files import standard_input
from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, check_caption_options, load_captioner

FORMATS = ("text", "jsonl", "csv", "srt", "vtt", "audacity")
# As in recap_hf.audio.pcm, which needs numpy.
SAMPLE_FORMATS = ("u8", "s16le", "s16be", "s24le", "s32le", "f32le", "f64le")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Caption sound as it arrives: WAV or raw PCM from standard input, a named pipe or a device, or a microphone. "
        "No sound is dropped: if the model is slower than the sound, a caption covers more of it (up to the encoder's "
        "window, several in a batch); once --buffer seconds wait, the source has to wait."
    )
    parser.add_argument("input", nargs="?", default="-", metavar="PIPE", help="default: standard input")
    parser.add_argument("--rate", type=positive, metavar="HZ", help="sampling rate of raw PCM, or of the microphone")
    parser.add_argument("--channels", type=positive, default=1, metavar="N", help="number of channels (default: 1)")
    parser.add_argument("--sample-format", choices=SAMPLE_FORMATS, default="s16le", help="default: %(default)s")
    text = 'name or number; needs "recap-hf[live]"'
    parser.add_argument("--microphone", nargs="?", const="", metavar="DEVICE", help=text)
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="sound in a caption (default: 5)")
    parser.add_argument("--silence-db", type=float, default=-60.0, metavar="DB", help="silence, dBFS (default: -60)")
    parser.add_argument("--buffer", type=float, default=600.0, metavar="S", help="sound to buffer (default: 600)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    text = 'publish captions there, for Home Assistant and others; needs "recap-hf[mqtt]"'
    parser.add_argument("--mqtt", metavar="HOST[:PORT]/TOPIC", help=text)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pieces at once (default: 8)")
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the stream ends or Ctrl-C ends it; what has arrived is captioned first."""
    check_caption_options(args)
    if args.microphone is not None and args.input != "-":
        print("recap live: error: --microphone and a pipe exclude each other: give one of them", file=sys.stderr)
        return 2
    from recap_hf import RecapFeatureExtractor, default_model_path
    from recap_hf.audio.live import LiveSound

    # A broker that is not there is reported before the model is loaded.
    with _publisher(args) as publish, _blocks(args) as blocks:
        settings = {}
        with contextlib.suppress(OSError):
            # A model that is not there is reported when it is loaded, after input that cannot be read.
            extractor = RecapFeatureExtractor.from_pretrained(args.model or str(default_model_path()))
            settings["sampling_rate"] = extractor.sampling_rate
        # Before the model is loaded, which takes longer than a pipe can hold.
        sound = LiveSound(blocks, args.buffer, **settings).start()
        # Input that cannot be read is reported before the model is loaded.
        if not sound.wait(1, timeout_s=0.5) and sound.error is not None:
            raise sound.error

        def stop(*_: Any) -> None:
            # A second Ctrl-C ends the process.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sound.stop()

        before = signal.signal(signal.SIGINT, stop)
        try:
            _caption(args, sound, publish)
        finally:
            signal.signal(signal.SIGINT, before)
    return 0


def _caption(args: argparse.Namespace, sound: Any, publish: Callable[[dict[str, Any]], None]) -> None:
    from recap_cli.formats import TIMELINE_WRITERS
    from recap_hf.audio.live import LiveCaptioner

    live = LiveCaptioner(load_captioner(args), args.interval, args.silence_db, args.batch_size)
    writer = TIMELINE_WRITERS[args.format](sys.stdout)
    writer.name = args.input
    # The head of a CSV or VTT is sent before the first caption.
    sys.stdout.flush()
    print("recap live: listening, Ctrl-C ends", file=sys.stderr, flush=True)
    for segment in live.run(sound):
        publish(segment)
        if args.format != "jsonl":
            del segment["delay"]
        writer.write(segment)
    writer.close()
    waited = "; the source had to wait" if sound.paused else ""
    print(
        f"recap live: {live.seconds:.1f} s captioned in {writer.count} captions, longest delay "
        f"{live.longest_delay:.2f} s{waited}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _publisher(args: argparse.Namespace) -> Iterator[Callable[[dict[str, Any]], None]]:
    if args.mqtt is None:
        yield lambda segment: None
        return
    from recap_hf.audio.mqtt import MqttPublisher

    with MqttPublisher(args.mqtt, lambda text: print(f"recap live: {text}", file=sys.stderr, flush=True)) as publisher:
        yield publisher.publish


@contextlib.contextmanager
def _blocks(args: argparse.Namespace) -> Iterator[Any]:
    from recap_hf.audio.microphone import microphone_blocks
    from recap_hf.audio.pcm import PcmFormat, pcm_blocks

    if args.microphone is not None:
        yield microphone_blocks(args.microphone, args.rate, args.channels)
        return
    raw = PcmFormat(args.rate, args.channels, args.sample_format) if args.rate else None
    source = standard_input().fileno() if args.input == "-" else args.input
    # Unbuffered: a read returns what has arrived, and a waiting thread holds no lock when Python ends.
    with open(source, "rb", buffering=0, closefd=args.input != "-") as file:
        yield pcm_blocks(file, raw)
