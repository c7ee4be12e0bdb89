"""What is to be packed: how, and the files that were found, parted into pieces by their bytes alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.tools import documents, image_folders, write
from trainer.data.tools.documents import CUTS, FileRange, RowRange, SplitOptions, Whole
from trainer.data.tools.image_folders import IMAGES, Pictures
from trainer.errors import ConfigError
from trainer.randomness import key as random_key

Text = Whole | FileRange | RowRange


@dataclass(frozen=True)
class Options:
    """How to pack. `validation`: share of the samples that a hash of their keys holds out; `kind`: what is packed of
    folders that hold both, `texts` or `images`. The rest is of text: `split`, `text_field`, `keep_json` (see
    `documents.Cut`), `field` (the member), `tokenizer` (see `write.tokenizer_recipe`), `separator` (its token that ends
    a document, if not the usual one), `tokenize` (store token ids), `on_error` (`fail`, or `skip` documents that cannot
    be read); and of images: `labels` (classes by folder)."""

    validation: float = 0.05
    kind: str | None = None
    shard_bytes: int = write.SHARD_BYTES
    split: str = "file"
    text_field: str = "text"
    keep_json: bool = False
    field: str = "txt"
    tokenizer: str = "bpe:1024"
    separator: str | None = None
    tokenize: bool = False
    on_error: str = "fail"
    labels: bool = True

    def problems(self) -> list[str]:
        found = []
        for name, given, known in (("split", self.split, CUTS), ("on-error", self.on_error, ("fail", "skip"))):
            if given not in known:
                found.append(f"--{name}: {given!r} is none of {', '.join(known)}")
        if self.kind not in (None, "texts", "images"):
            found.append(f"--kind: {self.kind!r} is none of texts, images")
        if not 0 <= self.validation < 1:
            found.append(f"--validation: a share from 0 to below 1, not {self.validation}")
        if not self.field:
            found.append("--field: needs a name, such as txt")
        if self.keep_json and self.field.lower() == "json":
            found.append("--field json: --keep-json makes a member of this name")
        return found

    def split_of(self, key: str) -> str:
        held_out = self.validation and random_key("validation", key) < self.validation * 2**63
        return "validation" if held_out else "train"

    @property
    def cut(self) -> SplitOptions:
        return SplitOptions(self.split, self.text_field, self.keep_json)

    def skips(self, into: list[str]) -> Callable[[str], object] | None:
        """What takes note of a document that cannot be read; None where that ends the work."""
        return into.append if self.on_error == "skip" else None


@dataclass(frozen=True)
class FoundFiles:
    """What there is to pack: text or pictures. `left_out`: files that are neither. `identity`: of all of it."""

    texts: list[Text]
    pictures: list[Pictures]
    classes: dict[str, int]
    names: list[str]
    left_out: list[Path]
    identity: str

    @property
    def size(self) -> int:
        return sum(piece.size for piece in (*self.texts, *self.pictures))


def find_files(inputs: Sequence[Path], options: Options, piece_bytes: int) -> FoundFiles:
    """The files to pack, in pieces. Raises one `ConfigError` with all that is wrong with them."""
    problems: list[str] = []
    problems += _twice(inputs)
    texts: list[tuple[Path, Path]] = []
    pictures: list[image_folders.Picture] = []
    left_out: list[Path] = []
    taken: set[str] = set()
    for given in (Path(os.path.abspath(path.expanduser())) for path in inputs):
        files = [(path, given.parent) for path in ([given] if given.is_file() else _files(given, problems))]
        if _are_images(given, files, options.kind, problems):
            found = image_folders.pictures(files, given, taken, problems)
            pictures += found
            packed = {file.path for picture in found for file in picture.files}
            left_out += [path for path, _ in files if path not in packed]
            continue
        named = [(path, base) for path, base in files if documents.NAME.fullmatch(path.name)]
        left_out += [path for path, _ in files if not documents.NAME.fullmatch(path.name)]
        texts += named
        if not named:
            kinds = "no .txt, .md or .jsonl file (plain, .xz, .gz or .zst), no .parquet, and no folder of images"
            problems.append(f"{given}: {kinds if files else 'missing or empty'}")
    if texts and pictures:
        problems.append("text and images cannot be in one data set: pack them apart")
    if problems:
        raise ConfigError(problems)
    sources = documents.sources(texts, taken)
    in_pieces, classes = image_folders.pieces(pictures, options.labels, piece_bytes)
    stated = [(s.key, str(s.path), s.size, s.mtime_ns) for s in sources]
    stated += [(p.key, str(f.path), f.size, f.mtime_ns) for p in pictures for f in p.files]
    return FoundFiles(
        texts=list(documents.pieces(sources, options.cut, piece_bytes)),
        pictures=in_pieces,
        classes=classes,
        names=[path.name for path, _ in texts] or [path.name for path in inputs],
        left_out=left_out,
        identity=identity_of(stated),
    )


def _are_images(given: Path, files: Sequence[tuple[Path, Path]], kind: str | None, problems: list[str]) -> bool:
    """Whether the images of what was given are packed, not its texts. It is a problem if both could be meant."""
    images = [path for path, _ in files if image_folders.extension(path) in IMAGES]
    if kind is not None or not images or not given.is_dir():
        return kind == "images" and given.is_dir()
    beside = {path.with_suffix("") for path in images}
    texts = [path for path, _ in files if documents.NAME.fullmatch(path.name) and path.with_suffix("") not in beside]
    if texts:
        problems.append(
            f"{given}: holds images ({len(images)}, such as {images[0].name}) and texts that belong to none of them "
            f"({len(texts)}, such as {texts[0].name}): say which to pack, --kind images or --kind texts"
        )
    return True


def _twice(inputs: Sequence[Path]) -> Iterator[str]:
    """Yields a problem for each input that is listed twice or lies inside another one."""
    real = [Path(os.path.realpath(path.expanduser())) for path in inputs]
    every, seen = set(real), set[Path]()
    for given, path in zip(inputs, real, strict=True):
        if folder := next((parent for parent in path.parents if parent in every), None):
            yield f"{given}: lies in {folder}, which is given too"
        if path in seen:
            yield f"{given}: is given twice"
        seen.add(path)


def _files(folder: Path, problems: list[str]) -> list[Path]:
    """All files in a folder, sorted; hidden ones are not data. What cannot be read is a problem."""
    found: list[Path] = []
    seen = set()
    unreadable: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:  # a link back
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]
        problems += [f"{path}: is a link to nothing" for path in paths if path.is_symlink() and not path.exists()]
    if folder.exists():
        problems += [f"{error.filename}: cannot be read: {error.strerror}" for error in unreadable]
    return sorted(found)


def identity_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
