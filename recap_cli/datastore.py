"""`recap datastore`: build, inspect, search and edit the captions that a captioner retrieves from."""

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from recap_cli.numbers import count, positive
from recap_cli.options import add_engine_arguments, add_threads, set_threads

_FILES = {
    "nargs": "+",
    "metavar": "FILE",
    "help": "captions: .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet files; a datastore; a saved dataset; "
    "NAME:FOLDER of clotho, audiocaps, recap, wavcaps or audiofolder as published; hub:USER/NAME",
}
_DEFAULT = " (default: %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, function: Any, text: str, *groups: Any, folder: bool = True) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(action_function=function)
        if folder:
            added.add_argument("folder", metavar="DIR", help="folder of the datastore, or milvus:URI#COLLECTION")
        for add_group in groups:
            add_group(added)
        return added

    sources, filters, index, model, form = _add_sources, _add_filters, _add_index, _add_model, _add_format
    groups = (_add_build, add_engine_arguments, sources, filters, index, model, form)
    action("build", _build, "make a datastore of captions", *groups, folder=False)
    info = action("info", _info, "show what a datastore holds, and how well it is searched", form)
    info.add_argument("--queries", type=count, default=128, help="captions to measure search on; 0: none" + _DEFAULT)
    _add_search(action("search", _search, "find the captions nearest to a text or a recording", model, form))
    text = "add captions; those that are there are not embedded again"
    add = action("add", _add, text, sources, filters, model, form)
    add.add_argument("files", **_FILES)
    text = "auto trains an outgrown index again" + _DEFAULT
    add.add_argument("--index", choices=("auto", "keep"), default="auto", help=text)
    _add_remove(action("remove", _remove, "remove captions by clip, text, source, licence, split or row"))
    merge = action("merge", _merge, "add the captions of other datastores of the same encoder")
    merge.add_argument("others", nargs="+", metavar="OTHER", help="folders of datastores; they are not changed")
    merge.add_argument("--output", metavar="NEW", help="do not change DIR either, and write the result there")
    action("filter", _filter, "remove the captions that the filters leave out", filters, model, form)
    _add_model(action("reembed", _reembed, "move a datastore to another encoder"), required=True)
    action("index", _index, "make the search index again, of another kind or for another recall", index, form)
    _add_export(action("export", _export, "write the captions as a file, or copy them into a vector database"))
    verify = action("verify", _verify, "read every byte of a datastore and report what is wrong with it", model)
    verify.add_argument("--encoder", action="store_true", help="embed some captions again and compare")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", **_FILES)
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder for the datastore")
    parser.add_argument("--overwrite", action="store_true", help="replace the datastore that DIR holds")
    types, text = ("float32", "float16", "int8"), "type in which they are stored" + _DEFAULT
    parser.add_argument("--embeddings-dtype", choices=types, default="float32", help=text)
    text = "find captions by their text, or by the audio of their clips, which needs NAME:FOLDER with recordings"
    parser.add_argument("--keys", choices=("text", "audio"), default="text", help=text + _DEFAULT)
    text = "that embed, each on a core or a GPU of its own" + _DEFAULT
    parser.add_argument("--num-processes", type=positive, default=1, help=text)
    parser.add_argument("--chunk-captions", type=positive, default=8192, help="embedded at a time" + _DEFAULT)


def _add_search(parser: argparse.ArgumentParser) -> None:
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="search for captions like this one")
    query.add_argument("--audio", metavar="FILE", help="search for captions of this recording")
    parser.add_argument("--k", type=positive, default=4, help="captions to find" + _DEFAULT)
    text = "0 to 1: captions that differ" + _DEFAULT
    parser.add_argument("--diversity", type=float, default=0.0, metavar="SHARE", help=text)
    text = "leave out captions below it (default: none)"
    parser.add_argument("--score-threshold", type=float, metavar="COSINE", help=text)
    parser.add_argument("--exclude-clip-id", metavar="ID", help="leave out the captions of this clip, and equal texts")


def _add_remove(parser: argparse.ArgumentParser) -> None:
    for name in ("clip-id", "text", "source", "licence", "split"):
        parser.add_argument(f"--{name}", action="append", default=[], help="may be given several times")
    parser.add_argument("--row", action="append", default=[], type=count, help="counted from 0, as search shows it")
    parser.add_argument("--clips-of", nargs="+", default=[], metavar="FILE", help="all clips that these files name")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help=".jsonl, .json, .csv, .txt or .parquet")
    parser.add_argument("--embeddings", metavar="FILE", help=".npy file for the embeddings")
    group = parser.add_argument_group("vector database, instead of a file")
    group.add_argument("--to", choices=("milvus",), help="which")
    group.add_argument("--uri", metavar="URI", help="captions.db for Milvus Lite, http://HOST:PORT for a cluster")
    group.add_argument("--collection", default="captions", help="its name there" + _DEFAULT)
    text = "index of Milvus: HNSW, IVF_FLAT, IVF_SQ8, DISKANN, ..."
    group.add_argument("--kind", default="HNSW", help=text + _DEFAULT)
    group.add_argument("--index-params", type=_json_object, metavar="JSON", help="such as '{\"M\": 32}'")
    group.add_argument("--search-params", type=_json_object, metavar="JSON", help="such as '{\"ef\": 128}'")
    group.add_argument("--overwrite", action="store_true", help="replace a collection of that name")


def _json_object(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r} ({error})") from error


def _add_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is known of the captions, beyond their files")
    group.add_argument("--source", help="name of the source of all captions")
    group.add_argument("--licence", help="licence of all captions")
    group.add_argument("--split", help="split of all captions; which split of NAME:FOLDER to read (default: train)")
    group.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="such as caption=text")
    text = "which to read where a file also holds weakly labelled ones" + _DEFAULT
    group.add_argument("--captions", choices=("all", "published", "weak"), default="all", help=text)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is left out")
    text = "longer captions, in decoder tokens; 0: none" + _DEFAULT
    group.add_argument("--max-tokens", type=count, default=50, help=text)
    text = "drop all but the first of equal captions; a search gives no text twice in any case" + _DEFAULT
    group.add_argument("--duplicates", choices=("keep", "exact", "normalised"), default="keep", help=text)
    text = "captions, weak ones too, of the clips in these files (the test CSVs) or the test split of NAME:FOLDER"
    group.add_argument("--exclude-clips", nargs="+", default=[], metavar="FILE", help=text)
    group.add_argument("--exclude-texts", action="store_true", help="and every caption with a text of those clips")
    text = "JSON lists of clip ids, as WavCaps publishes them"
    group.add_argument("--blacklist", nargs="+", default=[], metavar="FILE", help=text)
    group.add_argument("--commercial", action="store_true", help="captions whose licence forbids commercial use")


def _add_index(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search index")
    text = "auto (by size), exact, ivf_flat, ivf_sq8, ivf_pq, hnsw, or a FAISS string" + _DEFAULT
    group.add_argument("--index", default="auto", metavar="KIND", help=text)
    group.add_argument("--recall", type=float, default=0.95, help="recall@4 against exact search" + _DEFAULT)


def _add_model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    group = parser.add_argument_group("encoder")
    default = "" if required else " (default: the embedded recap-tiny)"
    group.add_argument("--model", required=required, help=f"folder or Hub id of a captioner{default}")
    group.add_argument("--batch-size", type=positive, default=64, help="captions per pass" + _DEFAULT)
    group.add_argument("--device", help="cpu, cuda, mps, ... (default: a GPU if there is one)")
    types = ("float32", "bfloat16", "float16")
    group.add_argument("--dtype", choices=types, default="float32", help="default: %(default)s")
    add_threads(group)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where `verify` finds something wrong or `search` nothing."""
    from recap_hf import datastore
    from recap_hf.data.schema import column_mapping

    args.columns = column_mapping(getattr(args, "columns", ()))
    return args.action_function(args, datastore) or 0


def _note(message: str) -> None:
    print(message, file=sys.stderr)


def _embedder(args: argparse.Namespace, api: Any) -> Any:
    embedder = api.CaptionEmbedder.from_pretrained(args.model, args.device, args.dtype, args.batch_size)
    set_threads(args, embedder.model)
    return embedder


def _source_options(args: argparse.Namespace, api: Any) -> Any:
    return api.SourceOptions(args.source, args.licence, args.split, args.columns, args.captions)


def _filter_options(args: argparse.Namespace, api: Any) -> Any:
    guard = api.LeakGuard.from_sources(args.exclude_clips, args.columns) if args.exclude_clips else None
    blacklists = tuple(entry for path in args.blacklist for entry in api.read_blacklist(path))
    own = {"guard": guard, "guard_texts": args.exclude_texts, "blacklists": blacklists, "commercial": args.commercial}
    return api.FilterOptions(args.max_tokens or None, args.duplicates, **own)


def _show(contents: Any, form: str) -> None:
    print(json.dumps(contents, ensure_ascii=False) if form == "json" else "\n".join(_text_lines(contents)))


def _text_lines(contents: Any, indent: str = "") -> list[str]:
    lines = []
    for key, value in contents.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_text_lines(value, indent + "  ")]
        elif value not in (None, {}, []):
            lines.append(f"{indent}{key}: {value:,}" if type(value) is int else f"{indent}{key}: {value}")
    return lines


def _build(args: argparse.Namespace, api: Any) -> None:
    given = {name: getattr(args, name) for name in ("index", "recall", "overwrite", "engine", "ray_address")}
    given |= {"dtype": args.embeddings_dtype, "chunk_captions": args.chunk_captions, "progress": _note}
    given["processes"] = args.num_workers if args.engine == "ray" else args.num_processes
    options = api.BuildOptions(**given)
    if args.keys == "audio" and (args.num_processes > 1 or args.engine != "local"):
        raise ValueError("--num-processes and --engine embed captions; recordings are embedded by one process")
    known = {"source_options": _source_options(args, api), "filter_options": _filter_options(args, api)}
    build = api.build_datastore
    if args.keys == "audio":
        build, known["batch_size"] = api.build_audio_datastore, min(args.batch_size, 16)
    store = build(args.files, args.output, _embedder(args, api), options=options, **known)
    _show(api.describe(store, queries=0), args.format)


def _info(args: argparse.Namespace, api: Any) -> None:
    _show(api.describe(api.CaptionDatastore.from_pretrained(args.folder), args.queries), args.format)


def _search(args: argparse.Namespace, api: Any) -> int:
    if args.text is not None and not args.text.strip():
        raise ValueError("--text is empty: give the words to search for")
    store = api.CaptionDatastore.from_pretrained(args.folder)
    embedder = _embedder(args, api)
    store.check_encoder(embedder.fingerprint)
    queries = embedder.embed([args.text]) if args.text is not None else embedder.embed_audio(args.audio)
    options = {"diversity": args.diversity, "score_threshold": args.score_threshold}
    (hits,) = store.search(queries, args.k, [args.exclude_clip_id], **options)
    if args.format == "json":
        print(json.dumps(hits, ensure_ascii=False))
    for hit in hits if args.format == "text" else ():
        origin = ", ".join(str(hit[key]) for key in ("source", "clip_id") if key in hit)
        print(f"{hit['score']:.3f}  {' '.join(hit['caption'].split())}" + (f"  ({origin})" if origin else ""))
    return 0 if hits else 1


def _add(args: argparse.Namespace, api: Any) -> None:
    options, filters = _source_options(args, api), _filter_options(args, api)
    records = chain.from_iterable(found for _, found in api.read_sources(args.files, options))
    _show(api.add_captions(args.folder, records, _embedder(args, api), filters, args.index), args.format)


def _remove(args: argparse.Namespace, api: Any) -> None:
    clips = api.LeakGuard.from_sources(args.clips_of).clip_ids if args.clips_of else ()
    selection = api.Selection([*args.clip_id, *clips], args.text, args.source, args.licence, args.split, args.row)
    print(f"removed: {api.remove_captions(args.folder, selection)}")


def _merge(args: argparse.Namespace, api: Any) -> None:
    if args.output:
        if Path(args.output).is_dir() and any(Path(args.output).iterdir()):
            raise FileExistsError(f"{args.output} is not empty: give a new folder as --output")
        api.CaptionDatastore.from_pretrained(args.folder).save_pretrained(args.output)
    print(f"added: {api.merge_datastores(args.output or args.folder, args.others)}")


def _filter(args: argparse.Namespace, api: Any) -> None:
    options = _filter_options(args, api)
    count_tokens = _embedder(args, api).count_tokens if options.max_tokens is not None else None
    _show(api.filter_datastore(args.folder, options, count_tokens), args.format)


def _reembed(args: argparse.Namespace, api: Any) -> None:
    api.reembed_datastore(args.folder, _embedder(args, api), _note)


def _index(args: argparse.Namespace, api: Any) -> None:
    _show(api.index_datastore(args.folder, args.index, args.recall) or {"kind": "exact"}, args.format)


def _export(args: argparse.Namespace, api: Any) -> None:
    if (args.file is None) == (args.to is None) or (args.to and not args.uri):
        raise ValueError("give either a FILE, or --to milvus with --uri: a file such as captions.db, or an address")
    store = api.CaptionDatastore.from_pretrained(args.folder)
    if args.to == "milvus":
        name = f"milvus:{args.uri}#{args.collection}"
        options = (args.kind, args.index_params, args.search_params, args.overwrite)
        exported = len(api.MilvusCaptionDatastore.from_datastore(store, name, *options))
        _note(f"use it as {name}")
    else:
        exported = api.export_datastore(store, args.file, args.embeddings)
    print(f"exported: {exported}")


def _verify(args: argparse.Namespace, api: Any) -> int:
    problems = api.verify_datastore(args.folder, _embedder(args, api) if args.encoder else None)
    print("\n".join(problems) if problems else "whole")
    return 1 if problems else 0
