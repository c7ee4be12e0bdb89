"""Masks secrets, which must not leave the process, in one place.

Addresses hold users, passwords and signatures, commands hold headers. The config in memory has them as they are; what
is written, sent or printed goes through `masked` (values of a config), `shown_override` (a command line), `shown` (an
address in a message) or `prose` (an error, an event, a log). A mask depends on no secret: two attempts of a run with a
renewed signature look the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

PIPE = "pipe:"
MASK = "***"
_USER = re.compile(r"((?:https?|s3|ftp):/|://)[^/\s'\"]*@")  # also where a slash is missing
_USER_MASK = r"\1***@"
_WHOLE = re.compile(r"([A-Za-z][\w+.-]*:/{1,2})([^/?#\s]*@)?([^?\s]*)(\?\S*)?")
# A masked query stays as it is, with the words behind it.
_QUERY = re.compile(r"((?:https?:/|://)[^\s?'\"]*)\?(?:\*\*\*(?![^\s'\",:;)\]}])|[^\s'\"]*)")
_VALUE = r"(?!\s)(?:\"[^\"]*\"|'[^']*'|[^\s'\"]+)"
_SECRET = re.compile(
    r"(?i)(\bauthorization['\"]?\s*[=:]\s*['\"]?(?:\w+\s+)?|\b(?:bearer|basic)\s+"
    r"|(?:^|\s)(?:-u|--user|--password)[=\s]+|(?:^|\s)-u(?=[^\s:]+:)"
    r"|[\w-]*(?:secret|token|password|passwd|api-?_?key|access_?key|signature)[\w-]*['\"]?\s*[=:]\s*)" + _VALUE
)
_HEADER = re.compile(r"((?i:\bauthorization)['\"]?\s*[=:]\s*['\"]?(?:\w+\s+)?|\bBearer\s+)" + _VALUE)
_NAME = (  # not just any `token`: models have tokens, too
    r"[\w-]*(?:secret|passw(?:or)?d|api[-_]?key|access[-_]?key|credential|authorization"
    r"|(?:hf|hub|api|auth|access|bearer|session|security|private|refresh|id|git\w*|wandb)[-_]token)[\w-]*"
)
_NAMED = re.compile(rf"(?i)(?:^|[.+]){_NAME}$")
_ASSIGNMENT = re.compile(rf"(?i)((?<![\w-]){_NAME}['\"]?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s'\",}}\]]+)")
_COMMAND = re.compile(rf"(?:^|(?<=[\s'\"\[,=({{])){PIPE}")
_PASSWORD = re.compile(
    r"://[\w-]{20,}@|(?:^|\s)(?:-u\s*|--user[=\s]+)[^\s:$]+:[^\s$]+|://[^/\s'\"$]*:[^/\s'\"$]+@|(?i:[?&][^\s'\"=&]*(?:sig|token|secret|key|passw|cred)[^\s=&]*=[^$\s])"
)
# Words of a command that are certainly not secrets are shown. All others are masked.
_WORD = re.compile(r"[|;&()<>]+|(?:[^\s'\"|;&()<>]|'[^']*'|\"[^\"]*\")+|['\"]")
_MASKED = re.compile(r"(?:-*\w[\w-]*=)?\*\*\*|\[[0-9a-f]{8}\]")
_PROGRAM = re.compile(r"[\w./~+-]+")
_ASSIGNED = re.compile(r"(-*\w[\w-]*=)")
_OPTION = re.compile(r"-[A-Za-z0-9]{1,4}|--[a-z][a-z0-9-]*")
_FILE = re.compile(r"\w[a-zA-Z0-9+.-]*://.*|[\w./+~=,@%{}*-]*\.(?:tar|tgz|gz|xz|bz2|zst|lz4|zip|enc|gpg)")
_PATH = re.compile(r"(?:\.{0,2}|~)/[\w./+~=,@%{}*-]*|\w{1,3}|-")


def shown(url: str) -> str:
    """Returns a URL or command as messages may show it: without user, password, query (signatures) or token.

    Of a command only programs, options, paths and URLs are left; a checksum distinguishes those that then look the
    same. It does not cover known secrets, which may be others in another attempt of a run.
    """
    if not url.startswith(PIPE):
        whole = _WHOLE.fullmatch(url)  # then all up to the path, and all behind it, is credentials
        if whole is None:
            return _without_credentials(url)
        scheme, user, path, query = whole.groups()
        return f"{scheme}{'***@' if user else ''}{_USER.sub(_USER_MASK, path)}{'?***' if query else ''}"
    text = without_secrets(url)
    masked = f"{PIPE}{_mask_words(text[len(PIPE) :])}"
    checksum = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return masked if masked == text else f"{masked} [{checksum}]"


def without_secrets(text: str) -> str:
    """Returns a command, or the output of a server or a command, without what looks like a secret."""
    return _SECRET.sub(r"\1***", _without_credentials(text))


def prose(text: str) -> str:
    """Returns a sentence, a log or a traceback without the credentials in its addresses and headers."""
    return _HEADER.sub(r"\1***", _without_credentials(text))


def masked(value: Any, text: Callable[[str], str] | None = None) -> Any:
    """Returns a copy of a tree of plain values without secrets: neither in its texts, masked by `text` (default: as
    addresses and commands), nor under a key that names one, such as `hf_token`."""
    match value:
        case str():
            return (text or _mask_value)(value)
        case dict():
            return {key: _mask_under_key(key, part, text) for key, part in value.items()}
        case list() | tuple():
            return [masked(part, text) for part in value]
    return value


def shown_override(text: str) -> str:
    """Returns a word of a command line, `key=value` or any other, as it may be shown."""
    key, equals, value = text.partition("=")
    if equals and _NAMED.search(key):
        return f"{key}={MASK}"
    return key + equals + _mask_value(_ASSIGNMENT.sub(r"\1***", value)) if equals else _mask_value(text)


def shown_command(words: Iterable[str]) -> str:
    """Returns a command line that can be pasted where it holds no secrets."""
    return shlex.join(map(shown_override, words))


def holds_secret(text: str) -> bool:
    """Returns whether a text spells out a password or a signature; a shell's `$NAME` is not one."""
    return bool(_PASSWORD.search(text) or _HEADER.search(text))


def hide_arguments() -> None:
    """Masks this process's arguments, which everybody on the machine can list and trackers record. They are
    overwritten in place, as database clients do with a password; the process that started us may still show them."""
    sys.argv[1:] = map(shown_override, sys.argv[1:])
    with suppress(OSError, ValueError, IndexError):  # not Linux
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        at, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
        for word in ctypes.string_at(at, end - at).split(b"\0"):
            hidden = os.fsencode(shown_override(os.fsdecode(word)))
            if hidden != word:
                ctypes.memmove(at, hidden[: len(word)].ljust(len(word)), len(word))
            at += len(word) + 1


def _without_credentials(text: str) -> str:
    return _QUERY.sub(r"\1?***", _USER.sub(_USER_MASK, text)) if ":/" in text else text


def _mask_value(text: str) -> str:
    """Masks a value, which may be an address or a command, or hold one."""
    if command := _COMMAND.search(text):
        return _mask_value(text[: command.start()]) + shown(text[command.start() :])
    return shown(text) if ":/" in text else text


def _mask_under_key(key: Any, value: Any, text: Callable[[str], str] | None) -> Any:
    is_secret = value and not isinstance(value, bool) and _NAMED.search(str(key))
    return MASK if is_secret else masked(value, text)


def _mask_words(command: str) -> str:
    begins, valued = True, False  # whether the next word is a program, or may be an option's value

    def word(match: re.Match[str]) -> str:
        nonlocal begins, valued
        spelt = match[0]
        if spelt[0] in "|;&()<>":
            begins, valued = not set(spelt) & set("<>"), False
            return spelt
        if spelt in "'\"":  # a quote without its end
            return spelt
        plain, first, after = spelt.strip("'\""), begins, valued
        begins, valued = first and _ASSIGNED.match(plain) is not None, _OPTION.fullmatch(plain) is not None
        whole = (_PROGRAM,) if first else (_OPTION, _FILE) if after else (_OPTION, _FILE, _PATH)
        if any(kind.fullmatch(plain) for kind in (_MASKED, *whole)):
            return spelt
        assigned = _ASSIGNED.match(plain)
        return f"{assigned[1] if assigned else ''}***"

    return _WORD.sub(word, command)
