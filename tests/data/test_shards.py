"""A whole data set against the webdataset library: same keys, same bytes; and what happens when it is not whole."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tests.data.ranks import on_ranks
from tests.data.tars import by_webdataset, make, open_below, storage, write
from trainer.data import shards as module
from trainer.data.index import SIDECAR, ShardIndex, Summary
from trainer.data.shard_spec import expand, file_name
from trainer.data.shards import Shards
from trainer.data.shared_work import WorkSharing
from trainer.errors import ConfigError, DataError


def load(spec: str | list[str], field: str | None = "txt", **options) -> Shards:
    first = spec if isinstance(spec, str) else spec[0]
    return Shards.open(spec, field, storage(Path(first).parent / "c"), **options)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("field", ["txt", "seg.json"])
def test_samples_are_those_of_webdataset(tmp_path: Path, field: str, mmap: bool) -> None:
    paths = make(tmp_path)
    expected = by_webdataset(paths)
    shards = Shards.open(paths, field, storage(tmp_path, mmap=mmap))
    assert [shards.name(v)[1] for v in range(shards.n)] == [sample["__key__"] for sample in expected]
    assert [shards.read(v) for v in range(shards.n)] == [sample[field] for sample in expected]
    for v, sample in enumerate(expected):
        assert shards.members(v) == {k: sample[k] for k in ("txt", "seg.json")}
        assert shards.members(v, [field]) == {field: sample[field]}
    sizes = np.concatenate([shards.sizes(i) for i in range(3)])
    assert sizes.tolist() == [len(sample[field]) for sample in expected]
    assert shards.bytes == sizes.sum()
    assert [shards.locate(v) for v in (0, 6, 7, 20)] == [(0, 0), (0, 6), (1, 0), (2, 6)]
    assert list(shards.locate_many(np.array([20, 0, 7]))) == [(2, 6), (0, 0), (1, 0)]
    assert shards.name(20) == ("s-02.tar", "dir/2-6")
    assert shards.path(20) == paths[2]
    with pytest.raises(IndexError):
        shards.read(21)
    shards.close()
    assert shards.read(20) == expected[20][field]
    assert pickle.loads(pickle.dumps(shards)).read(20) == expected[20][field]


@pytest.mark.parametrize("format", ["gnu", "ustar", "posix", "webdataset"])
def test_shards_by_gnu_tar_and_webdataset(tmp_path: Path, format: str) -> None:
    """Long names, empty members, in the three formats of GNU tar and as the library writes them itself."""
    content = {f"{'folder/' * 12}{i:03d}.{ext}": b"x" * (i * 700 % 5000) for i in range(30) for ext in ("cls", "jpg")}
    path = tmp_path / "a.tar"
    if format == "webdataset":
        with webdataset.TarWriter(str(path)) as writer:
            for i in range(30):
                key = f"{'folder/' * 12}{i:03d}"
                writer.write({"__key__": key, "cls": content[f"{key}.cls"], "jpg": content[f"{key}.jpg"]})
    else:
        for name, payload in content.items():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(payload)
        command = ["tar", "-C", tmp_path / "in", f"--format={format}", "--sort=name", "-cf", path, "folder"]
        subprocess.run(command, check=True)
    shards = load(str(path), None)
    expected = by_webdataset([str(path)])
    assert shards.n == len(expected) == 30
    for v, sample in enumerate(expected):
        assert shards.name(v)[1] == sample["__key__"]
        assert shards.members(v) == {k: v for k, v in sample.items() if not k.startswith("__")}


def test_compressed_and_piped_shards_are_the_same(tmp_path: Path) -> None:
    paths = make(tmp_path, 1)
    plain = load(paths)
    subprocess.run(["gzip", "-k", paths[0]], check=True)
    packed = load(f"{paths[0]}.gz")
    piped = Shards.open(f"pipe:cat {paths[0]}", "txt", storage(tmp_path, allow_pipe=True))
    for other in (packed, piped):
        assert [other.members(v) for v in range(7)] == [plain.members(v) for v in range(7)]
        assert other.summaries[0].digest == plain.summaries[0].digest
    with pytest.raises(ConfigError, match=r"^data\.shards: pipe:cat .*data\.allow_pipe=true"):
        load(f"pipe:cat {paths[0]}")


def test_many_threads_many_shards_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_room", lambda: 2)
    paths = make(tmp_path, shards=9, samples=5)
    shards, expected = load(paths), [sample["txt"] for sample in by_webdataset(paths)]
    order = [(v * 31 + t) % shards.n for t in range(8) for v in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.read, order)) == [expected[v] for v in order]
    assert open_below(tmp_path) <= 2
    shards.close()
    assert open_below(tmp_path) == 0


def test_shard_that_changes_under_the_run(tmp_path: Path) -> None:
    paths = make(tmp_path, 2)
    shards = load(paths)
    at = shards.index(0).members(6)["txt"][0]
    assert shards.read(6)
    os.truncate(paths[0], at + 10)  # while it is open
    with pytest.raises(DataError, match=rf"s-00\.tar: sample 'dir/0-6': byte {at + 10}: .* \d+ bytes are missing") as e:
        shards.read(6)
    assert (e.value.shard, e.value.key, e.value.byte) == (paths[0], "dir/0-6", at + 10)
    with pytest.raises(DataError, match=r"s-00\.tar: was changed after it had been indexed"):
        shards.check_unchanged(0)
    os.utime(paths[1], ns=(5, 5))
    with pytest.raises(DataError, match=r"s-01\.tar: was changed after it had been indexed"):
        shards.read(7)
    shards.close()
    os.unlink(paths[0])
    with pytest.raises(DataError, match=r"s-00\.tar.*No such file"):
        shards.read(0)


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    here = load(make(tmp_path / "a")).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    there = expand(str(tmp_path / "b" / "*.tar"))
    assert load(there).fingerprint == here
    assert load(there[:2]).fingerprint != here
    assert load(there[::-1]).fingerprint != here
    assert load(there, "seg.json").fingerprint != here
    assert load(make(tmp_path / "c", samples=6)).fingerprint != here


def test_missing_field_and_empty_data(tmp_path: Path) -> None:
    paths = make(tmp_path)
    with pytest.raises(ConfigError, match=r"s-00\.tar: sample 'dir/0-0' has no 'png'; it has: seg\.json, txt") as error:
        load(paths, "png")
    assert len(error.value.problems) == 3
    empty = write(tmp_path / "empty.tar", [])
    with pytest.raises(ConfigError, match=r"no samples in .*empty\.tar"):
        load(empty)
    with pytest.raises(ConfigError, match=r"^data\.validation: no samples"):
        load(empty, key="data.validation")
    assert load([empty, *paths], "TXT").n == 21


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make(tmp_path, 12, 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = str(tmp_path)
    assert expand(f"{base}/s-{{00..11}}.tar") == paths
    assert expand(f"{base}/s-*.tar") == paths
    assert expand("~/s-0{3,1}.tar") == [paths[3], paths[1]]
    assert expand([paths[5], f"{base}/s-1?.tar"]) == [paths[5], paths[10], paths[11]]
    assert expand("s3://b/x-{0..1}.tar") == ["s3://b/x-0.tar", "s3://b/x-1.tar"]
    odd = shutil.copy(paths[0], f"{base}/a{{1..2}}[x].tar")
    assert expand(odd) == [odd]
    bad = [f"{base}/no-*.tar", f"{base}/s-{{10..13}}.tar", f"{base}/{{a", base, "xyz://b/x.tar", paths[10]]
    with pytest.raises(ConfigError) as error:
        expand(bad, "data.validation")
    words = ["no file matches", "missing file", "missing file", "unbalanced", "is a folder", "cannot be read", "twice"]
    assert len(error.value.problems) == len(words)
    for problem, word in zip(error.value.problems, words, strict=True):
        assert problem.startswith("data.validation: ")
        assert word in problem
    with pytest.raises(ConfigError, match=r"^data\.shards: names no shard"):
        expand([])
    with pytest.raises(ConfigError, match=r"s3://b/x-\*\.tar: addresses know no \*; write braces"):
        expand("s3://b/x-*.tar")
    with pytest.raises(ConfigError) as error:
        expand(f"{base}/gone-{{0..99}}.tar")
    assert error.value.problems[20:] == ["data.shards: and 80 more like these"]


def test_folders_that_exist_are_no_patterns(tmp_path: Path) -> None:
    for name in ("[2024] set", "{1..3}", "a*b", "what?"):
        paths = make(tmp_path / name, 3, 1)
        assert expand(f"{tmp_path}/{name}/*.tar") == paths
        assert expand(f"{tmp_path}/{name}/s-{{00..02}}.tar") == paths
        assert expand(f"{tmp_path}/{name}/s-0[12].tar") == paths[1:]
    assert expand(f"{tmp_path}/*/s-00.tar") == sorted(map(str, tmp_path.glob("*/s-00.tar")))
    with pytest.raises(ConfigError, match=r"no file matches .*/\[2024\] set/x-\*\.tar"):
        expand(f"{tmp_path}/[2024] set/x-*.tar")


def test_what_is_not_packed_yet_is_told_how_to_be(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "b.md", "c.jsonl.gz", "d.parquet", "e.PNG"):
        (tmp_path / "texts" / name).write_bytes(b"{}")
        with pytest.raises(ConfigError) as caught:
            expand(f"{tmp_path}/texts/{name}")
        how = f"`onecurve data pack {tmp_path}/texts/{name} --out DIR` makes some of text or images"
        assert str(caught.value) == f"data.shards: {tmp_path}/texts/{name} is not a shard (a .tar); {how}"
    with pytest.raises(ConfigError) as caught:
        expand(f"{tmp_path}/texts")
    how = f"`onecurve data pack {tmp_path}/texts --out DIR` makes some of text or images"
    assert str(caught.value) == f"data.shards: {tmp_path}/texts is a folder without shards (.tar); {how}"


def damage(path: str, at: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 1
    Path(path).write_bytes(content)


def test_ranks_share_the_work_and_hear_of_each_others_damage(tmp_path: Path) -> None:
    """Each of two ranks indexes its half; what one finds damaged is raised on both, with exit code 3."""
    for case in ("whole", "damaged"):
        paths = make(tmp_path / case, 5)
        if case == "damaged":
            damage(paths[1], 3)

        def rank(team: WorkSharing, paths: list[str] = paths) -> Any:
            try:
                return load(paths, team=team).fingerprint
            except ConfigError as error:
                return error.exit_code, str(error)

        one, other = on_ranks(2, rank)
        assert one == other
        if case == "whole":
            assert one == load(paths).fingerprint
        else:
            assert one[0] == 3
            assert "s-01.tar: byte 0: damaged header" in one[1]


def test_tolerant_of_a_damaged_shard(tmp_path: Path) -> None:
    paths = make(tmp_path, 3)
    expected = by_webdataset(paths)
    damage(paths[1], load(paths).index(1).members(4)["txt"][0] - 500)
    with pytest.raises(ConfigError, match=r"s-01\.tar: byte \d+: damaged header"):
        load(paths)
    shards = load(paths, tolerant=True)
    assert shards.n == 7 + 3 + 7  # the fourth may go on behind the damage
    assert [shards.read(v) for v in range(17)] == [s["txt"] for s in expected[:10] + expected[14:]]
    (fault,) = shards.faults
    assert (fault.shard, "damaged header" in fault.cause) == (paths[1], True)


class Foreign:
    """What others write beside shards."""

    @staticmethod
    def energon(paths: list[str], count: int) -> None:
        for path in paths:
            with tarfile.open(path) as tar:
                starts = [m.offset for m in tar][::2]
            np.array([*starts, os.path.getsize(path) - 1024][-count - 1 :], "<u8").tofile(path + ".idx")

    @staticmethod
    def wids(paths: list[str], count: int) -> None:
        listed = [{"url": os.path.basename(path), "nsamples": count} for path in paths]
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
        Path(paths[0]).with_name("shardindex.json").write_text(json.dumps(index))

    @staticmethod
    def sizes(paths: list[str], count: int) -> None:
        Path(paths[0]).with_name("sizes.json").write_text(json.dumps({os.path.basename(p): count for p in paths}))


@pytest.mark.parametrize("kind", ["energon", "wids", "sizes"])
def test_indexes_of_others_are_believed_until_a_shard_is_read(tmp_path: Path, kind: str) -> None:
    paths = make(tmp_path, 3)
    expected = by_webdataset(paths)
    getattr(Foreign, kind)(paths, 7)
    shards = load(paths, None)
    assert shards.n == 21
    assert not list(tmp_path.glob(f"*{SIDECAR}"))  # none was walked
    assert shards.members(9) == {k: expected[9][k] for k in ("txt", "seg.json")}
    assert [p.name for p in tmp_path.glob(f"*{SIDECAR}")] == [f"s-01.tar{SIDECAR}"]
    assert load(paths, None).fingerprint == shards.fingerprint  # as before one of them was walked
    damage(paths[2], load(paths, None).index(2).members(4)["txt"][0] - 500)
    getattr(Foreign, kind)(paths, 7)
    shards = load(paths, None)
    assert shards.members(14 + 2) == {k: expected[16][k] for k in ("txt", "seg.json")}
    with pytest.raises(DataError, match=r"s-02\.tar: byte \d+: damaged header"):
        shards.members(14 + 3)


def test_indexes_of_others_that_lie(tmp_path: Path) -> None:
    paths = make(tmp_path, 2)
    Foreign.sizes(paths, 9)
    shards = load(paths, None)
    with pytest.raises(DataError, match=r"s-00\.tar: holds 7 samples, but .*delete or renew"):
        shards.members(8)
    assert load(paths).n == 14  # with a field, shards are walked


def test_a_hundred_thousand_shards(tmp_path: Path) -> None:
    """The catalog holds no more than a summary a shard; a rank opens the shards that it reads."""
    path = make(tmp_path, 1, 40)[0]
    summary = ShardIndex.open(path, storage(tmp_path)).summary
    urls = [f"{tmp_path}/no/{i}.tar" for i in range(100_000)]
    urls[77_777] = path
    shards = Shards(urls, [summary] * len(urls), "txt", storage(tmp_path))
    assert shards.n == 4_000_000
    assert shards.read(77_777 * 40 + 39) == by_webdataset([path])[39]["txt"]
    assert open_below(tmp_path) == 1
    assert len(pickle.dumps(shards)) < 25e6


def as_before(shards: Shards) -> list[tuple[str, Summary]]:
    return list(zip(map(file_name, shards.urls), shards.summaries, strict=True))


def test_a_shard_that_was_touched_or_damaged_before_it_was_damaged(tmp_path: Path) -> None:
    (path,) = make(tmp_path, 1)
    whole = load(path, tolerant=True)
    at = [whole.index(0).members(i)["txt"][0] for i in range(7)]
    os.utime(path, ns=(1, 1))
    assert load(path, tolerant=True, earlier_summaries=as_before(whole)).damaged_since == frozenset()
    os.truncate(path, at[5] + 5)
    since = load(path, tolerant=True, earlier_summaries=as_before(whole))
    assert (since.n, since.fingerprint, since.damaged_since) == (7, whole.fingerprint, {0})

    born = load(path, tolerant=True)  # a run that began with the damage
    text = bytes(born.read(1))
    assert born.n == 5
    os.truncate(path, at[2] + 5)
    for _ in range(2):
        worse = load(path, tolerant=True, earlier_summaries=as_before(born))
        assert (worse.n, worse.fingerprint, worse.damaged_since) == (5, born.fingerprint, {0})
        assert worse.read(1) == text
        with pytest.raises(DataError, match="the file ends here"):
            worse.read(4)
    assert load(path, tolerant=True).n == 2


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name, count in (("en", 7), ("de", 4)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0.tar", [(f"{i}.txt", name.encode() * 9) for i in range(count)])
    spec = [str(tmp_path / name / "0.tar") for name in ("en", "de")]
    whole = load(spec, tolerant=True)
    for paths in (spec, spec[::-1]):
        again = load(paths, tolerant=True, earlier_summaries=as_before(whole))
        assert (again.n, again.damaged_since) == (11, frozenset())
    assert again.fingerprint != whole.fingerprint


def test_what_another_index_told_stays_when_that_is_gone(tmp_path: Path) -> None:
    paths = make(tmp_path, 2)
    listing = tmp_path / "sizes.json"
    listing.write_text(json.dumps({Path(path).name: 7 for path in paths}))
    counted = load(paths, None)
    assert not counted.summaries[0].digest
    listing.unlink()
    again = load(paths, None, earlier_summaries=as_before(counted))
    assert again.fingerprint == counted.fingerprint
    walked = load(paths, None)
    assert walked.fingerprint != counted.fingerprint
    listing.write_text(json.dumps({Path(path).name: 7 for path in paths}))
    assert load(paths, None, earlier_summaries=as_before(walked)).fingerprint == walked.fingerprint


def test_the_first_rank_says_which_shards_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another rank sees differently cannot part them; a shard that it does not have is told on all."""
    paths = make(tmp_path, 4)

    def seen(team: WorkSharing) -> Shards:
        return Shards.open(paths[: 4 - team.rank], "txt", storage(tmp_path), team=team)

    assert len({shards.fingerprint for shards in on_ranks(2, seen)}) == 1
    for error in on_ranks(2, lambda team: Shards.open("gone-{0..1}.tar", "txt", storage(tmp_path), team=team)):
        assert isinstance(error, ConfigError)
        assert error.problems == [f"data.shards: missing file gone-{i}.tar" for i in range(2)]

    def blind(team: WorkSharing) -> Shards:
        monkeypatch.setattr(module, "expand", lambda *_, **__: [*paths, str(tmp_path / "elsewhere.tar")])
        return Shards.open(paths, "txt", storage(tmp_path), team=team)

    for error in on_ranks(2, blind):
        assert isinstance(error, ConfigError)
        assert "elsewhere.tar: cannot be read: No such file" in str(error)


def test_many_open_shards_stay_open_while_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make(tmp_path, 6, 3)
    shards, loaded = load(paths), list[int]()
    original = Shards._load
    monkeypatch.setattr(Shards, "_load", lambda self, number: loaded.append(number) or original(self, number))
    monkeypatch.setattr(module, "open_room", lambda: 3)
    for number in (0, 1, 2, 0, 3, 0, 4, 0):
        shards.read(3 * number)
    assert loaded == [0, 1, 2, 3, 4]  # the first stays: the last used are kept
    monkeypatch.setattr(module, "OPEN_BYTES", 1)
    shards.read(17)
    assert list(shards._open) == [5]
    shards.close()
    assert shards._open_bytes == 0


def test_a_shard_damaged_or_repaired_since_is_taken_as_it_was(tmp_path: Path) -> None:
    paths = make(tmp_path, 2)
    whole = load(paths, tolerant=True)
    content = Path(paths[1]).read_bytes()
    texts = [bytes(whole.read(v)) for v in range(14)]
    known = as_before(whole)
    at = whole.index(1).members(3)["txt"][0]

    os.truncate(paths[1], at + 5)
    shards = load(paths, tolerant=True, earlier_summaries=known)
    assert (shards.n, shards.fingerprint, shards.damaged_since) == (14, whole.fingerprint, {1})
    (fault,) = shards.faults
    assert fault.shard == paths[1]
    assert [shards.read(v) for v in range(10)] == texts[:10]
    with pytest.raises(DataError, match=r"s-01\.tar: sample 'dir/1-3': byte \d+: the file ends here"):
        shards.read(10)
    cut = load(paths, tolerant=True)  # a run that begins now
    assert (cut.n, cut.damaged_since) == (10, frozenset())
    with pytest.raises(ConfigError, match=r"s-01\.tar: byte \d+"):
        load(paths, earlier_summaries=known)

    Path(paths[1]).write_bytes(content)
    repaired = load(paths, tolerant=True, earlier_summaries=as_before(cut))
    assert (repaired.n, repaired.fingerprint, repaired.damaged_since) == (10, cut.fingerprint, frozenset())
    assert [repaired.read(v) for v in range(10)] == texts[:10]
    # Also where damage is not tolerated any more.
    assert load(paths, earlier_summaries=as_before(cut)).fingerprint == cut.fingerprint
    write(Path(paths[1]), [(f"dir/1-{i}.txt", b"other") for i in range(9)])
    replaced = load(paths, tolerant=True, earlier_summaries=known)
    assert replaced.n == 16
    assert replaced.fingerprint != whole.fingerprint
