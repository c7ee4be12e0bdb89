"""`onecurve data index | check | stats`: what is in shards, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from launch.progress import progress
from launch.sizes import size
from trainer.errors import ConfigError, DataError

T = TypeVar("T")

_CACHE_BYTES = 16 << 30  # of copies of remote shards; what a run may take


def add_command(commands: Any) -> None:
    parser = commands.add_parser("index", help="make the indexes of shards ahead of the first run")
    _add_shards(parser)
    parser.set_defaults(func=index)

    parser = commands.add_parser("check", help="read every byte of shards; exit code 3 if anything is wrong")
    _add_shards(parser)
    parser.add_argument("--decode", action="store_true", help="decode json, txt, npy, images, u16, u32, cls too")
    parser.set_defaults(func=check)

    parser = commands.add_parser("stats", help="samples, sizes, fields and tokens of shards")
    _add_shards(parser)
    parser.add_argument("--tokenizer", help="count the tokens of text: bytes or a tokenizer.json")
    parser.add_argument("--field", help="member that holds the text (txt)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    parser.set_defaults(func=stats)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs, {000..007} ranges, URLs")
    parser.add_argument("--cache", type=Path, help="the runs' data.cache (default: $ONECURVE_CACHE, ~/.cache/onecurve)")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--allow-pipe", action="store_true", help="let pipe:COMMAND run COMMAND in a shell")


def index(arguments: argparse.Namespace) -> int:
    """Makes the indexes that are missing; prints one line for each shard, then the sums."""
    parts, damaged = [], 0
    with _map_shards(arguments, _index, "indexing") as results:
        for url, (line, part) in results:
            print(f"{url}: {line}" if part else line)
            parts += [part] if part else []
            damaged += part is None
    print(f"{len(parts)} shards: {_summary(parts)}" + (f"; {damaged} damaged, not indexed" if damaged else ""))
    return DataError.exit_code if damaged else 0


def _index(url: str, storage: Any) -> tuple[str, tuple[int, int, dict[str, int]] | None]:
    """Returns the line to print about a shard, and its samples, bytes and fields, or None if it is damaged."""
    from trainer.data.index import SIDECAR, ShardIndex, places
    from trainer.data.storage import shown
    from trainer.data.storage.urls import local_path

    try:
        index = ShardIndex.open(url, storage)
    except DataError as error:
        return str(error), None
    index_path = next((place for place in places(url, storage) if ShardIndex.load(place, url, index.stamp)), None)
    if index_path is None:
        raise ConfigError(f"{shown(url)}: its index can be written neither beside it nor in --cache {storage.cache}")
    fields = {name: count for name, (count, _) in index.summary.fields.items()}
    part = len(index.keys), index.size, fields
    suffix = "" if index_path == Path(local_path(url) + SIDECAR) else f"; index in {index_path}"
    return _summary([part]) + suffix, part


def check(arguments: argparse.Namespace) -> int:
    """Prints one problem a line, then the sums; returns exit code 3 if there is a problem."""
    from trainer.data.tools.verify import verify

    parts, damaged, not_decoded = [], 0, set[str]()
    with _map_shards(arguments, verify, "checking", arguments.decode) as results:
        for _, verdict in results:
            for problem in verdict.problems:
                print(problem)
            damaged += bool(verdict.problems)
            not_decoded |= verdict.not_decoded
            parts.append((verdict.samples, verdict.size, verdict.fields))
    if not_decoded:
        print(f"not decoded: {', '.join(sorted(not_decoded))}")
    print(f"{len(parts)} shards, {damaged} damaged: {_summary(parts)}")
    return DataError.exit_code if damaged else 0


def stats(arguments: argparse.Namespace) -> int:
    """Prints the numbers of all shards together."""
    from trainer.data.tokenizer import load
    from trainer.data.tools.measure import measure, sum_measured

    if arguments.tokenizer:
        load(arguments.tokenizer)  # a problem with it is reported once
    parts = []
    with _map_shards(arguments, measure, "measuring", arguments.field, arguments.tokenizer) as results:
        parts = [part for _, part in results]
    sums = sum_measured(parts)
    if arguments.json:
        print(json.dumps(sums))
        return 0
    print(f"{sums['shards']} shards, {sums['samples']} samples, {size(sums['bytes'])}")
    for name, field in sums["fields"].items():
        some = "" if field["samples"] == sums["samples"] else f" in {field['samples']} samples"
        print(f"  {name}: {size(field['bytes'])}{some}")
    if "tokens" in sums:
        print(f"{sums['tokens']} tokens")
    if "sample_bytes" in sums:
        names = ", ".join(f"{name} {size(value)}" for name, value in sums["sample_bytes"].items())
        print(f"size of a sample: {names}")
        most = max(count for _, _, count in sums["histogram"])
        for low, high, count in sums["histogram"]:
            bar = "#" * -(-40 * count // most)
            print(f"  {size(low):>8} - {size(high):<8} {count:>10} {bar}")
    return 0


@contextmanager
def _map_shards(
    arguments: argparse.Namespace, function: Callable[..., T], title: str, *more: Any
) -> Iterator[Iterator[tuple[str, T]]]:
    """Calls a function with every shard, in parallel; yields each shard's URL as messages may show it and the result,
    in the order of the shards."""
    from trainer.data.shard_spec import expand
    from trainer.data.storage import Storage, default_cache, shown, unpack
    from trainer.data.storage.urls import PIPE
    from trainer.data.tools.parallel import Workers, cores

    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers: must be at least 1, not {arguments.workers}")
    urls = expand(arguments.shards, "SHARDS", allow_pipe=arguments.allow_pipe)
    cache = (arguments.cache or default_cache()).expanduser().absolute()
    # Commands run anew: what they gave to a run, or to another command, may no longer be what they give.
    storage = Storage(cache, _CACHE_BYTES, allow_pipe=arguments.allow_pipe, pipes=uuid.uuid4().hex)
    count = min(arguments.workers or cores(), len(urls))
    with ExitStack() as stack:
        for url in urls:
            if url.startswith(PIPE):
                stack.callback(unpack.forget, storage, url)
        report, workers = stack.enter_context(progress()), stack.enter_context(Workers(count))
        results = workers.in_order(function, ((url, storage, *more) for url in urls))

        def with_progress() -> Iterator[tuple[str, T]]:
            for number, (url, result) in enumerate(zip(urls, results, strict=True), 1):
                report(title, number, len(urls))
                yield shown(url), result

        yield with_progress()


def _summary(parts: list[tuple[int, int, dict[str, int]]]) -> str:
    """Returns samples, bytes and fields as text; a field that some samples lack has the number of those with it."""
    samples, counts = sum(part[0] for part in parts), Counter[str]()
    for _, _, fields in parts:
        counts.update(fields)
    names = [name if count == samples else f"{name} (in {count})" for name, count in sorted(counts.items())]
    return f"{samples} samples, {size(sum(part[1] for part in parts))}, fields: {', '.join(names) or 'none'}"
