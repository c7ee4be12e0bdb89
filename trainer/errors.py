"""What can end a run, each with its exit code. The text of an error is shown as it is, without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.secrets import prose


class OnecurveError(Exception):
    """Ends the run for a reason that a person can act on; the text has no credentials. `exit_code` is that of the
    process."""

    exit_code = 4
    retry = False
    """Whether a restart from the last checkpoint may succeed, with nothing changed."""
    recorded = False
    """Whether it is recorded in the run directory: then `onecurve train` reports it, once for all ranks."""

    def __init__(self, reason: str, exit_code: int | None = None):
        super().__init__(prose(reason))
        self.exit_code = exit_code or self.exit_code


class ConfigError(OnecurveError):
    """The command, the config or what it points at is wrong: all problems, found before anything was started."""

    exit_code = 2
    local = False
    """Whether this process alone found it, on its machine; else all processes did, and the main one reports it."""

    def __init__(self, problems: str | Sequence[str], exit_code: int | None = None):
        self.problems = [prose(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems), exit_code)


class DataError(OnecurveError):
    """A sample or shard cannot be read. The text names shard, key and byte; so do the fields, where they are known."""

    exit_code = 3

    def __init__(
        self, reason: str, *, shard: str | None = None, key: str | None = None, byte: int | None = None
    ) -> None:
        super().__init__(reason)
        self.shard, self.key, self.byte = shard, key, byte


class Outage(OnecurveError):
    """Storage did not answer for as long as it may be away. What it holds may be whole: so this is not a DataError,
    which could be taken for a bad sample, and not a reason to do without a checkpoint."""

    retry = True


class TrainingError(OnecurveError):
    """Training cannot go on (non-finite loss, out of memory, ...). The text says what to change."""

    exit_code = 4


class Crashed(TrainingError):
    """An unforeseen failure: an exception, a lost process, a hang."""

    retry = True


class PeerLost(OnecurveError):
    """Another rank failed first, and reports why. Carries that rank's exit code."""


class Interrupted(OnecurveError):
    """The run was asked to stop and has saved: run the same command again to continue."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its text, for events and messages."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
