"""`recap caption`: recordings in, captions out."""

import argparse
import datetime
import functools
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from recap_cli.numbers import positive
from recap_cli.options import (
    add_captioner_arguments,
    add_engine_arguments,
    caption_values,
    check_caption_options,
    load_captioner,
)
from recap_cli.results import Groups, Results, add_result_arguments, sources_of

# As in recap_cli.formats, which needs recap_hf.
COLUMNS = ("file", "caption", "score", "retrieved", "error", "similarity")
SIDECARS = ("txt", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # All flags in the usage would take a third of the screen.
    parser.usage = "recap caption [OPTIONS] RECORDING [RECORDING ...]"
    add_result_arguments(parser)
    text = f"of text and CSV, of {','.join(COLUMNS)}; --columns caption: captions alone"
    parser.add_argument("--columns", type=_columns, metavar="A,B", help=text)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="recordings at once (default: 8)")
    parser.add_argument("--timeline", action="store_true", help=argparse.SUPPRESS)
    _add_archive_arguments(parser)
    add_captioner_arguments(parser)
    add_engine_arguments(parser)
    text = "recordings in a part (default: 64)"
    parser.add_argument("--part-size", type=positive, default=64, metavar="N", help=text)
    parser.add_argument("--work-dir", metavar="DIR", help="of finished parts (default: beside --output)")


def _add_archive_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many recordings")
    text = "keep results in OUTPUT.resume; the same command goes on where it stopped"
    group.add_argument("--resume", action="store_true", help=text)
    text = "as --resume, also if settings changed since"
    group.add_argument("--resume-anyway", action="store_true", help=text)
    text = "write a file beside each recording: dog.txt with its caption, or dog.json"
    group.add_argument("--sidecar", choices=SIDECARS, help=text)
    text = "leave out recordings that have a sidecar"
    group.add_argument("--skip-existing", action="store_true", help=text)
    text = "do not look into folders of folders"
    group.add_argument("--no-recursive", dest="recursive", action="store_false", help=text)
    text = "caption, tags and model into the recordings themselves; their sound stays as it is"
    group.add_argument("--write-metadata", action="store_true", help=text)
    text = "also where a recording has such a field"
    group.add_argument("--overwrite-metadata", action="store_true", help=text)
    group.add_argument("--dry-run", action="store_true", help="print what --write-metadata would write")
    group.add_argument("--quiet", action="store_true", help="no progress")


def _columns(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(COLUMNS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different ones of {','.join(COLUMNS)}, got {text!r}")
    return names


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was captioned, 1 if some could not be, 2 if nothing was found to caption."""
    return _CaptionResults(args, "caption", "captioned").run()


class _CaptionResults(Results):
    # Loaded by `groups`, unless Ray does it.
    _captioner: Any = None

    def check(self) -> None:
        args = self.args
        if args.timeline:
            raise ValueError("--timeline is a command of its own: recap timeline RECORDING")
        check_caption_options(args)
        resume = args.resume or args.resume_anyway
        if resume and not args.output:
            raise ValueError("--resume needs --output FILE: its results are beside that file")
        if resume and (args.engine == "ray" or "-" in args.inputs):
            hint = "goes on where it stopped without it" if args.engine == "ray" else "cannot be read twice"
            raise ValueError(f"--resume: {'--engine ray' if args.engine == 'ray' else 'standard input'} {hint}")
        if resume and args.sidecar:
            raise ValueError(
                "--resume keeps results of a file: runs with a --sidecar go on by --skip-existing instead"
            )
        if args.columns and (args.format or Path(args.output or "").suffix.lower()[1:]) in ("json", "jsonl"):
            raise ValueError("--columns are of text and CSV; JSON has all of them")
        if (args.overwrite_metadata or args.dry_run) and not args.write_metadata:
            raise ValueError("--overwrite-metadata and --dry-run are about --write-metadata: give that, too")
        if args.dry_run and resume:
            raise ValueError("--dry-run writes nothing that --resume could go on from: leave one of them out")
        hint = "for the rows of a file there is --resume"
        if args.skip_existing and not args.sidecar:
            raise ValueError(f"--skip-existing leaves out recordings with a --sidecar: give one; {hint}")
        if args.skip_existing and args.output:
            raise ValueError(f"--skip-existing would replace {args.output} by the new rows alone; {hint}")

    def settings(self) -> dict[str, Any]:
        settings = _settings(self.args)
        # What is done already would not be written.
        asked = {name: True for name in ("write_metadata", "overwrite_metadata") if getattr(self.args, name)}
        return settings | asked

    def choose(self, names: list[str]) -> list[str]:
        flag = "--sidecar" if self.args.sidecar else "--write-metadata" if self.args.write_metadata else None
        for name in names if flag else ():
            if name == "-" or "://" in name:
                raise ValueError(f"{flag}: {name} is no file on this machine")
        if not self.args.sidecar:
            return names
        owners: dict[Path, str] = {}
        for name in dict.fromkeys(names):
            other = owners.setdefault(self._sidecar(name), name)
            if other != name:
                raise ValueError(f"--sidecar: {other} and {name} would have the same {self._sidecar(name).name}")
        there = {name for path, name in owners.items() if path.exists()}
        if there and not self.args.skip_existing:
            first = self._sidecar(min(there))
            raise ValueError(
                f"--sidecar: {first} is there, and {len(there) - 1} others are: --skip-existing leaves their "
                "recordings out; to replace them, delete them first"
            )
        return [name for name in names if name not in there]

    def _sidecar(self, name: str) -> Path:
        return Path(name).with_suffix(f".{self.args.sidecar}")

    def deliver(self, name: str, row: dict[str, Any]) -> None:
        from recap_hf.files import write_json, write_text

        if self.args.sidecar == "txt":
            write_text(self._sidecar(name), " ".join(row["caption"].split()) + "\n")
        elif self.args.sidecar == "json":
            write_json(self._sidecar(name), {"file": Path(name).name, **row})
        if self.args.write_metadata:
            self._write_metadata(name, row["caption"])

    def _write_metadata(self, name: str, caption: str) -> None:
        from recap_hf.audio.metadata import SoundDescription, write_metadata

        tags = [tag.name for tag in self._tagger().tag([name])[0]] if self._tagger() else []
        model = f"recap_hf {metadata.version('recap-hf')}, {Path(self.args.model or 'recap-tiny').name}"
        description = SoundDescription(" ".join(caption.split()), tuple(tags), model)
        fields = write_metadata(name, description, self.args.overwrite_metadata, self.args.dry_run)
        for field, text in fields.items() if self.args.dry_run else ():
            self.note(f"{name}: would write {field}: {text}")

    @functools.cache  # noqa: B019 (the command ends with it)
    def _tagger(self) -> Any:
        """Of the model's CLAP; `None` if it cannot name sounds without labels."""
        from recap_hf.tagging import Tagger

        try:
            if self._captioner is not None:
                return Tagger(self._captioner.model.clap, self._captioner.processor.feature_extractor)
            # Ray's workers hold the captioners.
            return Tagger.from_pretrained(self.args.model, device=self.args.device)
        except ValueError:
            return None

    def groups(self, names: list[str]) -> Groups:
        if self.args.write_metadata:
            # A missing extra is reported before the work.
            from recap_hf.audio.metadata import require_mutagen

            require_mutagen()
        if self.args.engine == "ray":
            yield from ([one] for one in _captioned_by_ray(self.args, names))
            return
        from recap_hf.streaming import caption_groups

        self._captioner, start = load_captioner(self.args), 0
        for group in caption_groups(self._captioner, sources_of(names), self.args.batch_size):
            # Of standard input a source has no name.
            group_names, start = names[start : start + len(group)], start + len(group)
            yield [(name, result) for name, (_, result) in zip(group_names, group, strict=True)]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What changes captions: the version, `model` and `datastore` if given, `dtype`, and the caption options."""
    from recap_hf.modeling.options_recap import CaptionOptions

    named = {name: _dated(value) for name in ("model", "datastore") if (value := getattr(args, name)) is not None}
    options = CaptionOptions(**caption_values(args)).to_dict()
    return {"recap_hf": metadata.version("recap-hf"), **named, "dtype": args.dtype, **options}


def _dated(name: str) -> str:
    """A name, and the time when what it names was changed if that is on this machine."""
    path = Path(name)
    files = [path, *path.rglob("*")] if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return name
    latest = max(file.stat().st_mtime for file in files)
    return f"{name} of {datetime.datetime.fromtimestamp(latest).isoformat(' ', 'milliseconds')}"


def _captioned_by_ray(args: argparse.Namespace, names: list[str]) -> Any:
    from recap_hf.ray_engine import RayOptions, caption_files_with_ray

    if "-" in names:
        raise ValueError("--engine ray cannot read standard input in its processes: give files, or leave it out")
    if not (args.work_dir or args.output):
        raise ValueError("--engine ray needs --output FILE, or --work-dir DIR for the finished parts")
    work = Path(args.work_dir or f"{args.output}.parts").resolve()
    options = RayOptions(args.num_workers, args.ray_address, args.batch_size, args.part_size)
    note = functools.partial(print, file=sys.stderr)
    load = functools.partial(load_captioner, args)
    yield from caption_files_with_ray(load, names, work, _settings(args), options, note)
