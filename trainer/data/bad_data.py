"""A record of what is wrong with a sample or a shard, for messages and files."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import DataError


@dataclass(frozen=True)
class BadData:
    """Says what is wrong: `shard` as the user wrote it, `key` of the sample, `byte` in the shard (None: not known), and
    `cause` in words."""

    shard: str | None
    key: str | None
    byte: int | None
    cause: str

    @classmethod
    def of(cls, error: DataError) -> BadData:
        return cls(error.shard, error.key, error.byte, str(error))

    def error(self) -> DataError:
        return DataError(self.cause, shard=self.shard, key=self.key, byte=self.byte)
