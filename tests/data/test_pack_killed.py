"""`onecurve data pack` that is killed, runs beside another one, or whose disk or inputs fail it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.data.packs import CLI, POEM, alive, contents, pack, read, wait_for
from trainer.data.index import SIDECAR, ShardIndex
from trainer.data.storage import Storage
from trainer.data.tokenizer import train_bpe
from trainer.data.tools.pack import Options, pack_inputs
from trainer.errors import ConfigError

SLOWLY = """
import sys, time
from pathlib import Path
from trainer.data.tools import pack
from trainer.data.tools.pack import Options, pack_inputs
inputs, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if __name__ == "__main__":
    options = Options(split="lines", tokenizer="bpe:300", tokenize=True, shard_bytes=200_000)
    pack_inputs([inputs], out, options, workers=workers, piece_bytes=40_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, (2,)), (2, (1, 3))])
def test_killed_at_any_time_it_goes_on(tmp_path: Path, workers: int, kills: tuple[int, ...]) -> None:
    random = Random(5)
    path, script, out = tmp_path / "in.txt", tmp_path / "pack.py", tmp_path / "out"
    path.write_text("".join(f"{random.getrandbits(900):x}\n" for _ in range(6000)))
    script.write_text(SLOWLY)
    command = [sys.executable, str(script), str(path), str(out), str(workers)]
    for done in kills:  # shards that are finished when it is killed
        process = subprocess.Popen(command, start_new_session=True)
        finished = lambda: list(tmp_path.glob(".out.partial/*/done/*"))  # noqa: E731
        wait_for(lambda: len(finished()) >= done or process.poll() is not None)  # noqa: B023
        assert process.poll() is None  # not done yet
        process.kill()
        process.wait()
        wait_for(lambda: not alive(process.pid))  # noqa: B023  # its workers too
        assert not out.exists()
        assert len(finished()) >= done
    kept = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.glob(".out.partial/*/out/*.tar")}
    kept = {name: stat for name, stat in kept.items() if f"{name}.sha256" in {p.name for p in finished()}}
    victim = next(tmp_path.glob(".out.partial/*/pieces/*.train"))  # as a power cut may leave it
    victim.write_bytes(bytes(victim.stat().st_size))
    assert subprocess.run(command, check=False).returncode == 0
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept} == kept
    subprocess.run([*command[:3], str(tmp_path / "once"), "1"], check=True)
    assert contents(out) == contents(tmp_path / "once")
    assert not list(tmp_path.glob(".*"))
    for shard in out.glob("*.tar"):
        storage = Storage(tmp_path / "cache")
        index = ShardIndex.load(Path(f"{shard}{SIDECAR}"), str(shard), storage.stamp(str(shard)))
        assert index == ShardIndex.build(storage.open(str(shard)))


def test_only_one_at_a_time(tmp_path: Path) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "out"
    path.write_text("text\n" * 10_000)
    (tmp_path / "pack.py").write_text(SLOWLY)
    process = subprocess.Popen([sys.executable, str(tmp_path / "pack.py"), str(path), str(out), "1"])
    wait_for(lambda: list(tmp_path.glob(".out.partial/*/pieces/*.npz")))
    process.send_signal(signal.SIGSTOP)
    try:
        for restart in (False, True):
            with pytest.raises(ConfigError, match=r"/out: is being packed by another process"):
                pack_inputs([path], out, Options(), restart=restart)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert out.exists()
    with pytest.raises(ConfigError, match="exists already"):
        pack(path, out)


def test_what_other_commands_left_is_not_used(tmp_path: Path) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "out"
    path.write_text("a\nb\nc\n" * 9)
    given = {"split": "lines", "tokenizer": "bytes", "validation": 0}
    with pytest.raises(KeyboardInterrupt):
        pack_inputs([path], out, Options(**given), report=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not out.exists()
    partial = tmp_path / ".out.partial"
    before = sorted(partial.rglob("*"))
    with pytest.raises(ConfigError, match=r"\.out\.partial: was left by a command with other arguments.*--restart"):
        pack(path, out, **given, field="md")
    os.utime(path, ns=(1, 1))  # inputs that have changed are others
    with pytest.raises(ConfigError, match="other arguments or inputs"):
        pack(path, out, **given)
    assert sorted(partial.rglob("*")) == before
    pack_inputs([path], out, Options(**given, field="md"), restart=True)
    assert len(read(out)) == 27
    assert not partial.exists()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "out"
    path.write_text("x" * 1000 + "\n" * 300)
    code = """
import resource, sys
from pathlib import Path
from trainer.data.tools.pack import Options, pack_inputs
from trainer.errors import ConfigError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    pack_inputs([Path(sys.argv[1])], Path(sys.argv[2]), Options(tokenizer="bytes", validation=0))
except ConfigError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(path), str(out)]
    done = subprocess.run([*command, "900"], capture_output=True, text=True, check=True)
    assert f"{out}: cannot be written: File too large; what is finished is kept, run the same" in done.stdout
    assert not out.exists()
    done = subprocess.run([*command, "1000000"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert len(read(out)) == 1


def test_an_input_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("a\n" * 1000)

    def told(what: str, done: int, total: int) -> None:
        path.write_text("b\n" * 1001)

    with pytest.raises(ConfigError, match=r"in\.txt: was changed while it was being packed"):
        pack_inputs([path], tmp_path / "out", Options(split="lines", tokenizer="bytes"), report=told, piece_bytes=100)
    assert os.listdir(tmp_path) == ["in.txt"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_beside_its_publishing_it_makes_the_same_anew(tmp_path: Path, when: str) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "out"
    path.write_text("a\nb\nc\n" * 99)
    given = {"split": "lines", "tokenizer": "chars", "validation": 0.2, "shard_bytes": 20_000}
    code = f"""
import os
from pathlib import Path
from trainer.data.tools import pack, write
if {when!r} == "before":
    write.publish = lambda *_: os._exit(9)
else:
    pack._remove = lambda *_: os._exit(9)
pack.pack_inputs([Path({str(path)!r})], Path({str(out)!r}), pack.Options(**{given}), piece_bytes=1 << 20)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert out.exists() == (when == "after")
    shutil.rmtree(out, ignore_errors=True)  # with what is in it all that was made is gone
    made = pack(path, out, **given)
    assert made == pack(path, tmp_path / "once", **given)
    assert contents(out) == contents(tmp_path / "once")
    assert "dataset.json" not in made["sha256"]
    assert not list(tmp_path.glob(".*"))


def test_a_work_folder_that_cannot_be_deleted_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, place, rmdir = tmp_path / "in.txt", tmp_path / ".out.partial", os.rmdir
    path.write_text("text")

    def beside(folder: str, **options: int | None) -> None:
        if os.fspath(folder) == str(place):  # what another command does at this moment
            (place / "lock").touch()
        rmdir(folder, **options)

    monkeypatch.setattr(os, "rmdir", beside)
    pack(path, tmp_path / "out", validation=0)
    assert os.listdir(place) == ["lock"]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    pack(path, tmp_path / "out", validation=0)


def test_a_given_tokenizer_that_changes_is_another_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("text")
    made = tmp_path / "chars-of-mine"  # begins as the name of one that is trained
    monkeypatch.chdir(tmp_path)
    given = Options(tokenizer=made.name, validation=0)
    stop = lambda *_: (_ for _ in ()).throw(RuntimeError)  # noqa: E731
    for size, expected in ((260, RuntimeError), (260, RuntimeError), (261, ConfigError)):
        made.write_text(train_bpe(["hello " * 9], size).to_str())
        with pytest.raises(expected):
            pack_inputs([Path("in.txt")], Path("out"), given, report=stop)


def test_a_damaged_table_of_a_piece_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("a\n" * 99)
    stop = lambda what, *_: (_ for _ in ()).throw(RuntimeError) if what == "packing" else None  # noqa: E731
    given = Options(split="lines", tokenizer="bytes", validation=0)
    with pytest.raises(RuntimeError):
        pack_inputs([path], tmp_path / "out", given, report=stop)
    (table,) = tmp_path.glob(".out.partial/*/pieces/*.npz")
    for damage in (b"", b"rubbish", table.read_bytes()[:-50]):
        table.write_bytes(damage)
        with pytest.raises(RuntimeError):
            pack_inputs([path], tmp_path / "out", given, report=stop)
    pack_inputs([path], tmp_path / "out", given)
    assert len(read(tmp_path / "out")) == 99


def test_letters_of_all_kinds_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes("ä€ü\n".encode() * 50)
    code = """
import os, sys
from pathlib import Path
from trainer.data.tools import pack, write
if sys.argv[1] == "stop":
    write.publish = lambda *_: os._exit(9)
pack.pack_inputs([Path("in.txt")], Path("out"), pack.Options(tokenizer="chars", validation=0, split="lines"))
"""
    plain = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": os.getcwd()}
    for what, code_of in (("stop", 9), ("go", 0)):
        done = subprocess.run([sys.executable, "-c", code, what], cwd=tmp_path, env=plain, check=False)
        assert done.returncode == code_of


@pytest.mark.slow
def test_a_killed_worker_is_told_of(tmp_path: Path) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "out"
    random = Random(5)
    path.write_text("".join(f"{random.getrandbits(900):x}\n" for _ in range(6000)))
    (tmp_path / "pack.py").write_text(SLOWLY)
    command = [sys.executable, str(tmp_path / "pack.py"), str(path), str(out), "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob(".out.partial/*/done/*")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, told = process.communicate(timeout=30)
    assert "a worker process was killed; most likely memory ran out: give fewer --workers" in told
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    out = tmp_path / "out"
    command = [*CLI, "pack", str(tmp_path / "poem.txt"), "--out", str(out), "--split", "lines", "--tokenize"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # no bars for a file
    assert re.search(r"train: \d+ samples, [\d.]+ KiB, \d+ tokens, .*/out/train-000000\.tar\n", done.stdout)
    assert f" data.tokenizer={out}/tokenizer.json data.field=u16\n" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[1:] == [
        f"  {out}: exists already; choose another folder, or delete this one"
    ]
    shutil.rmtree(out)
    ours, theirs = pty.openpty()
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)
    terminal = {**os.environ, "TERM": "xterm"}
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=terminal)
    assert shown.stdout.decode() == done.stdout
    assert b"packing" in os.read(ours, 1 << 20)
    for wrong, words in (
        (["--shard-mb", "0"], "--shard-mb"),
        (["--shard-mb", "inf"], "not inf"),
        (["--workers", "0"], "--workers: must be at least 1"),
    ):
        refused = subprocess.run([*command, *wrong], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert words in refused.stderr
