"""The request to pack: options, and the input files, split into pieces by their bytes alone."""

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
    """Options of packing. `validation`: share of the samples that a hash of their keys holds out; `kind`: what to pack
    of folders that hold both, `texts` or `images`. Options for text: `split`, `text_field`, `keep_json` (see
    `documents.SplitOptions`), `field` (the member), `tokenizer` (see `write.tokenizer_recipe`), `separator` (its token
    that ends a document, if not the usual one), `tokenize` (store token ids), `on_error` (`fail`, or `skip` documents
    that cannot be read). Option for images: `labels` (classes by folder)."""

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
        problems = []
        for name, value, choices in (("split", self.split, CUTS), ("on-error", self.on_error, ("fail", "skip"))):
            if value not in choices:
                problems.append(f"--{name}: {value!r} is none of {', '.join(choices)}")
        if self.kind not in (None, "texts", "images"):
            problems.append(f"--kind: {self.kind!r} is none of texts, images")
        if not 0 <= self.validation < 1:
            problems.append(f"--validation: a share from 0 to below 1, not {self.validation}")
        if not self.field:
            problems.append("--field: needs a name, such as txt")
        if self.keep_json and self.field.lower() == "json":
            problems.append("--field json: --keep-json makes a member of this name")
        return problems

    def split_of(self, key: str) -> str:
        held_out = self.validation and random_key("validation", key) < self.validation * 2**63
        return "validation" if held_out else "train"

    @property
    def split_options(self) -> SplitOptions:
        return SplitOptions(self.split, self.text_field, self.keep_json)

    def skips(self, causes: list[str]) -> Callable[[str], object] | None:
        """Returns the callback that notes a document that cannot be read; None if such a document is an error."""
        return causes.append if self.on_error == "skip" else None


@dataclass(frozen=True)
class FoundFiles:
    """The files to pack: text or pictures. `left_out`: files that are neither. `identity`: a hash of all of them."""

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
    """Returns the files to pack, in pieces. Raises one `ConfigError` with all problems."""
    problems: list[str] = []
    problems += _duplicate_inputs(inputs)
    texts: list[tuple[Path, Path]] = []
    pictures: list[image_folders.Picture] = []
    left_out: list[Path] = []
    used_keys: set[str] = set()
    for entry in (Path(os.path.abspath(path.expanduser())) for path in inputs):
        files = [(path, entry.parent) for path in ([entry] if entry.is_file() else _files(entry, problems))]
        if _are_images(entry, files, options.kind, problems):
            samples = image_folders.pictures(files, entry, used_keys, problems)
            pictures += samples
            packed = {file.path for picture in samples for file in picture.files}
            left_out += [path for path, _ in files if path not in packed]
            continue
        text_files = [(path, base) for path, base in files if documents.NAME.fullmatch(path.name)]
        left_out += [path for path, _ in files if not documents.NAME.fullmatch(path.name)]
        texts += text_files
        if not text_files:
            kinds = "no .txt, .md or .jsonl file (plain, .xz, .gz or .zst), no .parquet, and no folder of images"
            problems.append(f"{entry}: {kinds if files else 'missing or empty'}")
    if texts and pictures:
        problems.append("text and images cannot be in one data set: pack them apart")
    if problems:
        raise ConfigError(problems)
    sources = documents.sources(texts, used_keys)
    picture_pieces, classes = image_folders.pieces(pictures, options.labels, piece_bytes)
    file_facts = [(s.key, str(s.path), s.size, s.mtime_ns) for s in sources]
    file_facts += [(p.key, str(f.path), f.size, f.mtime_ns) for p in pictures for f in p.files]
    return FoundFiles(
        texts=list(documents.pieces(sources, options.split_options, piece_bytes)),
        pictures=picture_pieces,
        classes=classes,
        names=[path.name for path, _ in texts] or [path.name for path in inputs],
        left_out=left_out,
        identity=identity_of(file_facts),
    )


def _are_images(entry: Path, files: Sequence[tuple[Path, Path]], kind: str | None, problems: list[str]) -> bool:
    """Returns whether to pack the images of an input, not its texts. Adds to `problems` if both are possible."""
    images = [path for path, _ in files if image_folders.extension(path) in IMAGES]
    if kind is not None or not images or not entry.is_dir():
        return kind == "images" and entry.is_dir()
    image_stems = {path.with_suffix("") for path in images}
    texts = [
        path for path, _ in files if documents.NAME.fullmatch(path.name) and path.with_suffix("") not in image_stems
    ]
    if texts:
        problems.append(
            f"{entry}: holds images ({len(images)}, such as {images[0].name}) and texts that belong to none of them "
            f"({len(texts)}, such as {texts[0].name}): say which to pack, --kind images or --kind texts"
        )
    return True


def _duplicate_inputs(inputs: Sequence[Path]) -> Iterator[str]:
    """Yields a problem for each input that is listed twice or lies inside another one."""
    real_paths = [Path(os.path.realpath(path.expanduser())) for path in inputs]
    all_paths, earlier_paths = set(real_paths), set[Path]()
    for entry, path in zip(inputs, real_paths, strict=True):
        if folder := next((parent for parent in path.parents if parent in all_paths), None):
            yield f"{entry}: lies in {folder}, which is given too"
        if path in earlier_paths:
            yield f"{entry}: is given twice"
        earlier_paths.add(path)


def _files(folder: Path, problems: list[str]) -> list[Path]:
    """Returns all files in a folder, sorted, without hidden ones. Adds to `problems` what cannot be read."""
    files: list[Path] = []
    visited_folders = set()
    unreadable: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in visited_folders:  # a link back
            folders.clear()
            continue
        visited_folders.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.is_file()]
        problems += [f"{path}: is a link to nothing" for path in paths if path.is_symlink() and not path.exists()]
    if folder.exists():
        problems += [f"{error.filename}: cannot be read: {error.strerror}" for error in unreadable]
    return sorted(files)


def identity_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
