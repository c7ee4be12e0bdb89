"""What is wrong with a sample or a shard, as it is told and written down."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import DataError


@dataclass(frozen=True)
class BadData:
    """`shard` as it was given, `key` of the sample and `byte` in the shard where they are known, `cause` in words."""

    shard: str | None
    key: str | None
    byte: int | None
    cause: str

    @classmethod
    def of(cls, error: DataError) -> BadData:
        return cls(error.shard, error.key, error.byte, str(error))

    def error(self) -> DataError:
        return DataError(self.cause, shard=self.shard, key=self.key, byte=self.byte)
