"""Storage of shards: in a local file, behind a URL, inside a compressed file, or in a command's output."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.data.storage.settings import Blob, Settings
from trainer.data.storage.urls import PIPE, check, is_remote, is_url, local_path, shown
from trainer.errors import ConfigError

__all__ = ["Blob", "Storage", "default_cache", "is_remote", "is_url", "shown"]


def default_cache() -> Path:
    """Returns the default cache folder."""
    try:
        return Path(os.environ.get("ONECURVE_CACHE") or "~/.cache/onecurve").expanduser()
    except RuntimeError:
        raise ConfigError("this user has no home folder to keep a cache in: set HOME or ONECURVE_CACHE") from None


@dataclass(frozen=True)
class Storage(Settings):
    """Opens shards. It can be pickled; open connections and caches belong to the process."""

    def open(self, url: str) -> Blob:
        """Opens the blob of a path or URL. Raises ConfigError (a scheme that cannot be read, a `pipe:` that is not
        allowed, a missing package), DataError (it does not exist or is damaged) and Outage (it cannot be reached)."""
        from trainer.data.storage import unpack

        check(url, self.allow_pipe)
        if url.startswith(PIPE):
            return unpack.piped(self, url)
        if unpack.compression(url):
            return unpack.unpacked(self, url, lambda: self.plain(url, keep=False))
        return self.plain(url)

    def stamp(self, url: str) -> str:
        """Returns the blob's present stamp, without reading it; but the output of a `pipe:` must be read first."""
        from trainer.data.storage import local, remote

        check(url, self.allow_pipe)
        if url.startswith(PIPE):
            return self.open(url).stamp
        return remote.stamp(self, url) if is_remote(url) else local.stamp(local_path(url), url, self)

    def plain(self, url: str, keep: bool = True) -> Blob:
        """Opens the blob as it is stored. `keep=False`: its bytes are not cached, for what is read once."""
        from trainer.data.storage import unpack
        from trainer.data.storage.local import LocalBlob
        from trainer.data.storage.remote import RemoteBlob

        if not is_remote(url):
            return LocalBlob(local_path(url), url, mmap=self.mmap, storage=self)
        blob = RemoteBlob(self, url, keep)
        return blob if blob.ranges else unpack.copied(self, blob)
