"""`recap datastore`: build, look into, search and edit the captions that a captioner retrieves from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recap_cli.choice import add_choice_arguments
from recap_cli.numbers import count, positive
from recap_cli.options import add_engine_arguments

_FILES_HELP = (
    "captions: .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet files; a datastore; a saved dataset; "
    "NAME:FOLDER of clotho, audiocaps, recap, wavcaps or audiofolder as published; hub:USER/NAME"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_add_build, _add_info, _add_search, _add_add, _add_remove, _add_merge, _add_filter):
        add(actions)
    for add in (_add_reembed, _add_index, _add_export, _add_verify):
        add(actions)


def _action(actions: Any, name: str, function: Any, text: str, folder: bool = True) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(action_function=function)
    if folder:
        parser.add_argument("folder", metavar="DIR", help="folder of the datastore, or milvus:URI#COLLECTION")
    return parser


def _add_build(actions: Any) -> None:
    parser = _action(actions, "build", _build, "make a datastore of captions", folder=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help=_FILES_HELP)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the datastore")
    parser.add_argument("--overwrite", action="store_true", help="replace the datastore that DIR holds")
    parser.add_argument(
        "--embeddings-dtype",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="stored (default: %(default)s)",
    )
    parser.add_argument(
        "--keys",
        choices=("text", "audio"),
        default="text",
        help="find captions by what they say, or by the audio of their clips (after Koizumi et al.), which needs "
        "NAME:FOLDER with recordings (default: %(default)s)",
    )
    parser.add_argument("--num-processes", type=positive, default=1, help="that embed (default: %(default)s)")
    parser.add_argument(
        "--chunk-captions", type=positive, default=8192, help="embedded and noted at a time (default: %(default)s)"
    )
    add_engine_arguments(parser)
    _add_source_options(parser)
    _add_filter_options(parser)
    _add_index_options(parser)
    _add_model_options(parser)
    _add_format(parser)


def _add_info(actions: Any) -> None:
    parser = _action(actions, "info", _info, "what a datastore holds, and how well it is searched")
    parser.add_argument(
        "--queries",
        type=count,
        default=128,
        help="captions that the search is measured on; 0: not at all (default: %(default)s)",
    )
    _add_format(parser)


def _add_search(actions: Any) -> None:
    parser = _action(actions, "search", _search, "the captions nearest to a text or a recording")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="search for captions like this one")
    query.add_argument("--audio", metavar="FILE", help="search for captions of this recording")
    parser.add_argument("--k", type=positive, default=4, help="how many (default: %(default)s)")
    add_choice_arguments(parser)
    parser.add_argument("--exclude-clip-id", metavar="ID", help="leave out the captions of this clip, and equal texts")
    _add_model_options(parser)
    _add_format(parser)


def _add_add(actions: Any) -> None:
    parser = _action(actions, "add", _add, "add captions; what is there is not embedded again")
    parser.add_argument("files", nargs="+", metavar="FILE", help=_FILES_HELP)
    parser.add_argument(
        "--index",
        choices=("auto", "keep"),
        default="auto",
        help="auto remakes a stale index (default: %(default)s)",
    )
    _add_source_options(parser)
    _add_filter_options(parser)
    _add_model_options(parser)
    _add_format(parser)


def _add_remove(actions: Any) -> None:
    parser = _action(actions, "remove", _remove, "remove captions by clip, text, source, licence, split or row")
    for flag, name in (
        ("--clip-id", "ID"),
        ("--text", "CAPTION"),
        ("--source", "NAME"),
        ("--licence", "NAME"),
        ("--split", "NAME"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=name, help="may be given several times")
    parser.add_argument("--row", action="append", default=[], type=count, help="counted from 0, as search shows it")
    parser.add_argument("--clips-of", nargs="+", default=[], metavar="FILE", help="all clips that these files name")
    parser.add_argument("--purge", action="store_true", help="delete the texts from the disk now, not some day")


def _add_merge(actions: Any) -> None:
    parser = _action(actions, "merge", _merge, "add the captions of other datastores of the same encoder")
    parser.add_argument("others", nargs="+", metavar="OTHER", help="folders of datastores; they stay as they are")
    parser.add_argument("--output", metavar="NEW", help="leave DIR as it is, too, and write the result there")


def _add_filter(actions: Any) -> None:
    parser = _action(actions, "filter", _filter, "remove what the filters leave out")
    _add_filter_options(parser)
    _add_model_options(parser)
    _add_format(parser)


def _add_reembed(actions: Any) -> None:
    parser = _action(actions, "reembed", _reembed, "move a datastore to another encoder")
    _add_model_options(parser, required=True)


def _add_index(actions: Any) -> None:
    parser = _action(actions, "index", _index, "make the search index anew, of another kind or for another recall")
    _add_index_options(parser)
    _add_format(parser)


def _add_export(actions: Any) -> None:
    parser = _action(actions, "export", _export, "write the captions as a file, or copy them into a vector database")
    parser.add_argument("file", nargs="?", metavar="FILE", help=".jsonl, .json, .csv, .txt or .parquet")
    parser.add_argument("--embeddings", metavar="FILE", help=".npy file for the embeddings")
    group = parser.add_argument_group("vector database, instead of a file")
    group.add_argument("--to", choices=("milvus",), help="which")
    group.add_argument("--uri", metavar="URI", help="captions.db for Milvus Lite, http://HOST:PORT for a cluster")
    group.add_argument("--collection", default="captions", help="its name there (default: %(default)s)")
    group.add_argument(
        "--kind", default="HNSW", help="index of Milvus: HNSW, IVF_FLAT, IVF_SQ8, DISKANN, ... (default: %(default)s)"
    )
    group.add_argument("--index-params", type=_json_object, metavar="JSON", help="such as '{\"M\": 32}'")
    group.add_argument("--search-params", type=_json_object, metavar="JSON", help="such as '{\"ef\": 128}'")
    group.add_argument("--overwrite", action="store_true", help="replace a collection of that name")


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found


def _add_verify(actions: Any) -> None:
    parser = _action(actions, "verify", _verify, "read every byte of a datastore and say what is wrong with it")
    parser.add_argument("--encoder", action="store_true", help="embed some captions again and compare")
    _add_model_options(parser)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is known of the captions, beyond what their files say")
    group.add_argument("--source", help="name of where all of them are from")
    group.add_argument("--licence", help="licence of all of them")
    group.add_argument("--split", help="split of all of them; which split of NAME:FOLDER to read (default: train)")
    group.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="such as caption=text")
    group.add_argument(
        "--captions",
        choices=("all", "published", "weak"),
        default="all",
        help="which to read where a file also holds weakly labelled ones (default: %(default)s)",
    )


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--max-tokens",
        type=count,
        default=50,
        help="longer captions, in decoder tokens; 0: none (default: %(default)s)",
    )
    group.add_argument(
        "--duplicates",
        choices=("keep", "exact", "normalised"),
        default="keep",
        help="drop all but the first of equal captions; a search gives no text twice anyway (default: %(default)s)",
    )
    group.add_argument(
        "--exclude-clips",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out captions, weak ones too, of the clips in these files (the test CSVs), or of the test split of "
        "NAME:FOLDER",
    )
    group.add_argument(
        "--exclude-texts", action="store_true", help="and every caption with the text of one of those clips"
    )
    group.add_argument(
        "--blacklist", nargs="+", default=[], metavar="FILE", help="JSON lists of clip ids, as WavCaps publishes them"
    )
    group.add_argument("--commercial", action="store_true", help="captions whose licence forbids commercial use")


def _add_index_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search index")
    group.add_argument(
        "--index",
        default="auto",
        metavar="KIND",
        help="auto (by size), exact, ivf_flat, ivf_sq8, ivf_pq, hnsw, or a FAISS string (default: %(default)s)",
    )
    group.add_argument(
        "--recall", type=float, default=0.95, help="recall@4 against the exact search (default: %(default)s)"
    )


def _add_model_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    group = parser.add_argument_group("encoder")
    default = "" if required else " (default: the embedded recap-tiny)"
    group.add_argument("--model", required=required, help=f"folder or Hub id of a captioner{default}")
    group.add_argument("--batch-size", type=positive, default=64, help="captions per pass (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, mps, ... (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where `verify` finds something wrong or `search` nothing."""
    return args.action_function(args)


def _note(message: str) -> None:
    print(message, file=sys.stderr)


def _embedder(args: argparse.Namespace) -> Any:
    from recap_hf.datastore import CaptionEmbedder

    return CaptionEmbedder.from_pretrained(args.model, args.device, args.dtype, args.batch_size)


def _source_options(args: argparse.Namespace) -> Any:
    from recap_hf.datastore import SourceOptions

    return SourceOptions(args.source, args.licence, args.split, _columns(args.columns), args.captions)


def _columns(pairs: list[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ValueError(f"--columns takes OURS=THEIRS pairs, such as caption=text, got {pair!r}")
        columns[ours] = theirs
    return columns


def _filter_options(args: argparse.Namespace) -> Any:
    from recap_hf.datastore import FilterOptions, LeakGuard, read_blacklist

    columns = _columns(getattr(args, "columns", []))
    return FilterOptions(
        max_tokens=args.max_tokens or None,
        duplicates=args.duplicates,
        guard=LeakGuard.from_sources(args.exclude_clips, columns) if args.exclude_clips else None,
        guard_texts=args.exclude_texts,
        blacklists=tuple(entry for path in args.blacklist for entry in read_blacklist(path)),
        commercial=args.commercial,
    )


def _show(contents: Any, form: str) -> None:
    if form == "json":
        print(json.dumps(contents, ensure_ascii=False))
        return
    for line in _text_lines(contents):
        print(line)


def _text_lines(contents: Any, indent: str = "") -> list[str]:
    lines = []
    for key, value in contents.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_text_lines(value, indent + "  ")]
        elif value not in (None, {}, []):
            lines.append(f"{indent}{key}: {value:,}" if type(value) is int else f"{indent}{key}: {value}")
    return lines


def _build(args: argparse.Namespace) -> int:
    from recap_hf.datastore import build_audio_datastore, build_datastore, describe

    if args.keys == "audio":
        build, own = build_audio_datastore, {"batch_size": min(args.batch_size, 16)}
        if args.num_processes > 1 or args.engine != "local":
            raise ValueError("--num-processes and --engine embed captions; recordings are embedded by one process")
    else:
        build, own = build_datastore, _engine_options(args)
    store = build(
        args.files,
        args.output,
        _embedder(args),
        source_options=_source_options(args),
        filter_options=_filter_options(args),
        index=args.index,
        recall=args.recall,
        dtype=args.embeddings_dtype,
        overwrite=args.overwrite,
        progress=_note,
        **own,
    )
    _show(describe(store, queries=0), args.format)
    return 0


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    processes = args.num_workers if args.engine == "ray" else args.num_processes
    return {
        "processes": processes,
        "engine": args.engine,
        "ray_address": args.ray_address,
        "chunk_captions": args.chunk_captions,
    }


def _info(args: argparse.Namespace) -> int:
    from recap_hf import CaptionDatastore
    from recap_hf.datastore import describe

    _show(describe(CaptionDatastore.from_pretrained(args.folder), args.queries), args.format)
    return 0


def _search(args: argparse.Namespace) -> int:
    from recap_hf import CaptionDatastore

    if args.text is not None and not args.text.strip():
        raise ValueError("--text is empty: give the words to search for")
    store = CaptionDatastore.from_pretrained(args.folder)
    embedder = _embedder(args)
    store.check_encoder(embedder.fingerprint)
    queries = embedder.embed([args.text]) if args.text is not None else embedder.embed_audio(args.audio)
    (hits,) = store.search(
        queries, args.k, [args.exclude_clip_id], diversity=args.diversity or 0.0, score_drop=args.score_drop
    )
    if args.format == "json":
        print(json.dumps(hits, ensure_ascii=False))
    for hit in hits if args.format == "text" else ():
        origin = ", ".join(str(hit[key]) for key in ("source", "clip_id") if key in hit)
        print(f"{hit['score']:.3f}  {' '.join(hit['caption'].split())}" + (f"  ({origin})" if origin else ""))
    return 0 if hits else 1


def _add(args: argparse.Namespace) -> int:
    from itertools import chain

    from recap_hf.datastore import add_captions, read_source

    options = _source_options(args)
    records = chain.from_iterable(read_source(name, options) for name in args.files)
    _show(add_captions(args.folder, records, _embedder(args), _filter_options(args), args.index), args.format)
    return 0


def _remove(args: argparse.Namespace) -> int:
    from recap_hf.datastore import LeakGuard, Selection, remove_captions

    clips = LeakGuard.from_sources(args.clips_of).clip_ids if args.clips_of else ()
    selection = Selection([*args.clip_id, *clips], args.text, args.source, args.licence, args.split, args.row)
    print(f"removed: {remove_captions(args.folder, selection, args.purge)}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from recap_hf import CaptionDatastore
    from recap_hf.datastore import merge_datastores
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME

    if args.output:
        if Path(args.output, MANIFEST_NAME).is_file():
            raise FileExistsError(f"{args.output} holds a datastore already: give another --output")
        CaptionDatastore.from_pretrained(args.folder).save_pretrained(args.output)
    print(f"added: {merge_datastores(args.output or args.folder, args.others)}")
    return 0


def _filter(args: argparse.Namespace) -> int:
    from recap_hf.datastore import filter_datastore

    options = _filter_options(args)
    count_tokens = _embedder(args).count_tokens if options.max_tokens is not None else None
    _show(filter_datastore(args.folder, options, count_tokens), args.format)
    return 0


def _reembed(args: argparse.Namespace) -> int:
    from recap_hf.datastore import reembed_datastore

    reembed_datastore(args.folder, _embedder(args), _note)
    return 0


def _index(args: argparse.Namespace) -> int:
    from recap_hf.datastore import index_datastore

    _show(index_datastore(args.folder, args.index, args.recall) or {"kind": "exact"}, args.format)
    return 0


def _export(args: argparse.Namespace) -> int:
    from recap_hf import CaptionDatastore
    from recap_hf.datastore import export_datastore

    if (args.file is None) == (args.to is None):
        raise ValueError("give either a FILE, or --to milvus with --uri")
    store = CaptionDatastore.from_pretrained(args.folder)
    if args.to == "milvus":
        count = _export_to_milvus(store, args)
    else:
        count = export_datastore(store, args.file, args.embeddings)
    print(f"exported: {count}")
    return 0


def _export_to_milvus(store: Any, args: argparse.Namespace) -> int:
    from recap_hf.datastore import MilvusCaptionDatastore

    if not args.uri:
        raise ValueError("--to milvus needs --uri: a file such as captions.db, or the address of a cluster")
    name = f"milvus:{args.uri}#{args.collection}"
    copied = MilvusCaptionDatastore.from_datastore(
        store, name, args.kind, args.index_params, args.search_params, args.overwrite
    )
    _note(f"use it as {name}")
    return len(copied)


def _verify(args: argparse.Namespace) -> int:
    from recap_hf.datastore import verify_datastore

    problems = verify_datastore(args.folder, _embedder(args) if args.encoder else None)
    print("\n".join(problems) if problems else "whole")
    return 1 if problems else 0
