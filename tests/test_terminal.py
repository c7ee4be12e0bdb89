"""Terminals of any encoding, and none: what is printed neither ends a command nor keeps a report from being written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from tests.exported import LLAMA, config_of, shaken
from tests.tracking.demo_run import demo_run
from trainer import run, sampling
from trainer.data.tokenizer import ByteTokenizer
from trainer.processes import make_printing_safe


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return demo_run(tmp_path / "run", steps=20)


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_command_prints_what_the_encoding_has(encoding: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal(encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.argv", ["onecurve", "report", str(run_dir)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    told = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "where the time went" in told
    assert ("\u2587" if encoding == "utf-8" else "???") in told


def test_without_a_terminal(run_dir: Path) -> None:
    """`>&-`: descriptors that are closed are nobody else's, either."""
    read, write = os.pipe()
    script = (
        "from launch.cli import main; import os\n"
        f"try: main()\nfinally: os.write({write}, os.readlink('/proc/self/fd/1').encode())"
    )
    command = ["/bin/sh", "-c", 'exec "$0" -c "$1" report "$2" >&- 2>&-', sys.executable, script, str(run_dir)]
    done = subprocess.run(command, pass_fds=[write])
    os.close(write)
    with os.fdopen(read) as told:
        assert told.read() == os.devnull
    assert done.returncode == 0
    assert (run_dir / "report.html").exists()


def test_the_report_is_written_before_anything_is_printed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", terminal("ascii"))
    monkeypatch.setattr(sampling, "sample", lambda *_: ["caf\u00e9"])
    config = config_of(*LLAMA, f"run.dir={run_dir}")
    with pytest.raises(UnicodeEncodeError):
        run._show(config, run_dir, ByteTokenizer(), shaken(config))
    assert "caf" in (run_dir / "samples.txt").read_text()
    assert (run_dir / "report.html").exists()
    make_printing_safe()
    run._show(config, run_dir, ByteTokenizer(), shaken(config))


def test_a_prompt_of_another_encoding() -> None:
    """As Python reads a command line under LC_ALL=C: bytes that are not ASCII are half of surrogates."""
    config = config_of(*LLAMA, "sample.tokens=1", "sample.count=1")
    prompt = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"prompt": prompt})})
    (text,) = sampling.sample(config, shaken(config), ByteTokenizer())
    assert text.startswith("caf\u00e9")
