"""The code in README and docs/: every fenced block, and the commands within sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence, `language` empty where none is named."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def file(self) -> str:
        """Returns the file that the first line names, such as `# my_package/net.py`; empty where it names none."""
        named = re.match(r"# (\S+\.(?:py|yaml))\b", self.text)
        return named[1] if named else ""


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Returns the blocks of a page in their order. Every fence belongs to one, so that none is overlooked."""
    text = (ROOT / page).read_text()
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    found = [Block(page, text.count("\n", 0, it.start()) + 1, it[1], it[2]) for it in pattern.finditer(text)]
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.M)
    assert len(fences) == 2 * len(found), f"{page}: has {len(fences)} fences, but {len(found)} blocks that begin a line"
    return tuple(found)


def all_blocks() -> Iterator[Block]:
    for page in PAGES:
        yield from blocks(page)


def sentences(page: str) -> list[str]:
    """Returns the code within sentences and tables, without the blocks, each text once."""
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return list(dict.fromkeys(" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)))


def write_files(page: str, folder: Path) -> list[Block]:
    """Writes the files that a page shows, and an empty `my_package/__init__.py`; returns the blocks of the files."""
    named = [block for block in blocks(page) if block.file]
    for block in named:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(block.text)
    (folder / "my_package").mkdir(exist_ok=True)
    (folder / "my_package" / "__init__.py").touch()
    return named
