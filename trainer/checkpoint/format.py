"""What a checkpoint is on disk: `step-00000100/` with torch's distributed format and a manifest that came last.

Nothing in it is executed: non-tensor state is JSON in the manifest, and torch's pickled index is read by an unpickler
that knows a dozen names.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from trainer.errors import TrainingError
from trainer.files import sha256, sync_folder

VERSION = 1
MANIFEST = "manifest.json"
INDEX = ".metadata"


class Damaged(Exception):
    """This checkpoint does not count; the text says why."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, with its own checksum in it, durably."""
    with open(folder / MANIFEST, "w") as file:
        json.dump({**manifest, "sha256": _self_digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own checksum. Raises Damaged; OSError; TrainingError if it is not for us."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stated = manifest.pop("sha256")
    except FileNotFoundError:
        raise Damaged("no manifest.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"manifest.json cannot be read: {error}") from None
    if stated != _self_digest(manifest):
        raise Damaged("manifest.json does not match its own checksum")
    if manifest.get("version") != VERSION:
        raise TrainingError(f"{folder}: format version {manifest.get('version')}, this onecurve reads {VERSION}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint: every file there, of its size, with its checksum. Raises Damaged."""
    manifest = read_manifest(folder)
    for name, stated in manifest["files"].items():
        path = folder / name
        if PurePosixPath(name).name != name or path.is_symlink():
            raise Damaged(f"file name '{name}' leads out of the folder")
        if not path.is_file() or path.stat().st_size != stated["bytes"]:
            raise Damaged(f"{name} is missing or not of {stated['bytes']} bytes")
    for name, stated in manifest["files"].items():
        if sha256(folder / name) != stated["sha256"]:
            raise Damaged(f"{name} does not match its checksum")
    return manifest


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class SafeReader(FileSystemReader):
    """torch's reader, without its two ways of running what a file says: the pickled index and pickled values."""

    def sizes(self) -> dict[str, torch.Size]:
        """The shape of each tensor in the checkpoint."""
        stored = self.read_metadata().state_dict_metadata.items()
        return {name: item.size for name, item in stored if isinstance(item, TensorStorageMetadata)}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(item, TensorStorageMetadata):
                raise Damaged(f"'{name}' in the index is no tensor")
        for info in metadata.storage_data.values():
            if PurePosixPath(info.relative_path).name != info.relative_path:
                raise Damaged(f"path '{info.relative_path}' in the index leads out of the folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_METADATA = "torch.distributed.checkpoint.metadata"
_TENSOR_NAMES = frozenset({
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    *(("torch", name) for name in ("Size", "float64", "float32", "float16", "bfloat16")),
    *(("torch", name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
})  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Only what torch's own index of tensors is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _TENSOR_NAMES:
            raise Damaged(f"the index names {module}.{name}, which no tensor needs")
        return super().find_class(module, name)
