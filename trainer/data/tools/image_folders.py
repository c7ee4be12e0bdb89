"""Reads folders of images as samples: each image with its text, JSON or label file, and the class its folder names.

`INPUT/cat/0001.jpg` and `INPUT/cat/0001.json` are the sample `INPUT/cat/0001` with the members jpg, json and cls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.data.tools.documents import check_unchanged, unique_key
from trainer.errors import ConfigError

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif", "jp2", "heic"}
SIDE_FILES = {"txt", "json", "cls"}


class File(NamedTuple):
    extension: str
    path: Path
    size: int
    mtime_ns: int


class Picture(NamedTuple):
    """A sample: its files, and the name of its class."""

    key: str
    files: tuple[File, ...]
    label: str | None


@dataclass(frozen=True)
class Pictures:
    """A piece of a folder of images. `classes` has the number of each class; {} for none."""

    pictures: tuple[Picture, ...]
    classes: dict[str, int]

    @property
    def size(self) -> int:
        return sum(file.size for picture in self.pictures for file in picture.files)

    def samples(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields the key and the payloads of each sample. Raises `ConfigError` for a file that cannot be read."""
        for picture in self.pictures:
            members = {}
            for file in picture.files:
                try:
                    members[file.extension] = file.path.read_bytes()
                    check_unchanged(file.path, file.size, file.mtime_ns)
                except OSError as error:
                    raise ConfigError(f"{file.path}: cannot be read: {error.strerror}") from error
            if picture.label is not None and self.classes:
                members.setdefault("cls", b"%d" % self.classes[picture.label])
            yield picture.key, members


def extension(path: Path) -> str:
    return path.suffix[1:].lower()


def pictures(
    files: Sequence[tuple[Path, Path]], folder: Path, used_keys: set[str], problems: list[str]
) -> list[Picture]:
    """Returns the samples of a folder. `files`: each file in it, and the folder that its key is relative to.

    Adds to `problems` and `used_keys`. Files without an image of the same name are left out. The class of an image is
    the folder within `folder` that it lies in.
    """
    groups: dict[Path, list[tuple[Path, Path]]] = {}
    for path, base in files:
        if extension(path) in IMAGES | SIDE_FILES:
            groups.setdefault(path.with_suffix(""), []).append((path, base))
    samples = []
    for stem, group in groups.items():
        names = [extension(path) for path, _ in group]
        if not IMAGES & set(names):
            continue
        if len(set(names)) < len(names):
            problems.append(f"{group[0][0]}: another file has the same name but for upper and lower case")
        stats = [(path, path.stat()) for path, _ in group]
        parts = group[0][0].relative_to(folder).parts
        key = unique_key(stem.relative_to(group[0][1]).as_posix(), "image", used_keys)
        members = tuple(File(extension(path), path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
        samples.append(Picture(key, members, parts[0] if len(parts) > 1 else None))
    return samples


def pieces(samples: Sequence[Picture], labels: bool, piece_bytes: int) -> tuple[list[Pictures], dict[str, int]]:
    """Splits the samples into pieces of about `piece_bytes`; returns them and the classes, numbered by name."""
    names = sorted({picture.label for picture in samples if picture.label is not None}) if labels else []
    classes = {name: number for number, name in enumerate(names)}
    parts, batch, size = [], [], 0
    for picture in samples:
        batch.append(picture)
        size += sum(file.size for file in picture.files)
        if size >= piece_bytes:
            parts.append(Pictures(tuple(batch), classes))
            batch, size = [], 0
    if batch:
        parts.append(Pictures(tuple(batch), classes))
    return parts, classes
