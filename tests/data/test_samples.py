"""Samples as tensors: webdataset decodes the same members, and what is random follows from the draw alone."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from trainer.config.compose import load
from trainer.data.batch_sizes import Batches
from trainer.data.images import ImageTensor, random_box
from trainer.data.mixture import Mixture
from trainer.data.samples import Recipe, Samples
from trainer.data.shards import Shards
from trainer.data.storage import Storage
from trainer.data.stream import OrderedSource, RankStream, Stream
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError, DataError
from trainer.sampling import continues_text

PLAIN = ImageTensor(None, False, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(number: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def array(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **options)
    return file.getvalue()


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def birds(count: int = 12) -> dict[str, dict[str, bytes]]:
    """Every other image a JPEG, the others PNGs, some of them grey or with a palette."""
    modes = ["RGB", "RGB", "L", "P", "RGB", "RGBA"]
    return {
        f"bird-{i:03d}": {
            "jpg" if i % 2 == 0 else "png": encoded(
                picture(i, mode="RGB" if i % 2 == 0 else modes[i % 6]), "JPEG" if i % 2 == 0 else "PNG"
            ),
            "cls": str(i % 5).encode(),
            "json": json.dumps({"weights": [i, 0.5], "name": f"n{i}"}).encode(),
            "vector.npy": array(np.arange(3, dtype=">f4") + i),
            "txt": f"bird {i}, é".encode(),
        }
        for i in range(count)
    }


def recipe(
    fields: dict[str, str], image: ImageTensor = PLAIN, length: int = 8, maps: Any = (), **options: Any
) -> Recipe:
    return Recipe(fields, ByteTokenizer(), length, image, maps, **options)


def opened(shard: Path, made: Recipe, **options: Any) -> Samples:
    return Samples(Shards.open(str(shard), None, Storage(shard.parent / "cache"), **options), made)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "birds.tar", birds())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's package with functions for `data.maps`; named after the test, for modules are imported once."""
    name = f"package_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(
        """
import functools

def weights(sample, draw):
    sample["weights"] = sample.pop("meta")["weights"]
    return sample

def note(sample, draw):
    sample.setdefault("drawn", []).append(draw)
    sample["key"] = len(sample["__key__"])
    return sample

by_lambda = lambda sample, draw: note(sample, draw)
no_function = 3

def forgets(sample, draw):
    sample["label"] += 1

def fails_on_three(sample, draw):
    return sample if sample["label"] != 3 else 1 / 0

def needs(sample, draw):
    import no_such_package_anywhere

def square(sample, draw):
    left = draw % 8
    sample["image"] = sample["image"].crop((left, 0, left + 20, 20))
    return sample
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_decoded_as_webdataset_does(shard: Path) -> None:
    pipeline = webdataset.WebDataset(str(shard), shardshuffle=False).decode("torchrgb")
    theirs = list(pipeline.rename(image="jpg;png", label="cls", vector="vector.npy", text="txt"))
    fields = {"image": "jpg;png", "label": "cls", "vector": "vector.npy", "tokens": "txt"}
    ours = opened(shard, recipe(fields, length=20))
    assert (ours.n, len(theirs)) == (12, 12)
    assert ours.bytes == sum(len(content) for members in birds().values() for content in members.values())
    for i, expected in enumerate(theirs):
        row = ours.read(i, draw=99)
        assert row.keys() == {"image", "label", "vector", "inputs", "targets"}
        assert row["image"].dtype == torch.float32
        torch.testing.assert_close(row["image"], expected["image"], rtol=0, atol=0)
        assert (row["label"].item(), row["label"].dtype) == (expected["label"], torch.int64)
        assert row["vector"].tolist() == expected["vector"].tolist()
        text = [256, *expected["text"].encode(), 256]
        assert row["inputs"][: len(text) - 1].tolist() == text[:-1]
        assert row["targets"].tolist() == text[1:] + [-100] * (21 - len(text))
        assert ours.entry(i) == ["birds.tar", f"bird-{i:03d}"]


def test_text_is_cut_at_the_length(shard: Path) -> None:
    row = opened(shard, recipe({"tokens": "txt"}, length=4)).read(0, 0)
    assert row["inputs"].tolist() == [256, *b"bir"]
    assert row["targets"].tolist() == [*b"bird"]


def test_members_in_capitals_and_compressed(tmp_path: Path) -> None:
    import gzip

    shard = write(tmp_path / "a.tar", {"a": {"CLS": b"4", "json.gz": gzip.compress(b"[1, 2]")}})
    row = opened(shard, recipe({"label": "Cls", "list": "json.gz"})).read(0, 0)
    assert (row["label"].item(), row["list"].tolist()) == (4, [1, 2])


def test_of_several_extensions_the_first_that_is_there(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"a": {"cls": b"1", "id": b"2"}, "b": {"cls": b"3"}, "c": {"txt": b"4"}})
    samples = opened(shard, recipe({"label": "id;cls"}))
    assert [samples.read(i, 0)["label"].item() for i in (0, 1)] == [2, 3]
    with pytest.raises(
        DataError, match=r"a\.tar: byte \d+: sample 'c': has no 'id' or 'cls' .*; it has: txt"
    ) as caught:
        samples.read(2, 0)
    assert caught.value.key == "c"


def test_a_field_that_no_sample_has_is_found_at_the_start(shard: Path) -> None:
    opened(shard, recipe({"label": "cls"})).check()
    with pytest.raises(
        ConfigError, match=r"data\.fields\.image=jpeg;webp: no sample of .*birds\.tar has it; .*jpg, json"
    ):
        opened(shard, recipe({"image": "jpeg;webp", "label": "cls"})).check()


@pytest.mark.parametrize("extension", ["pkl", "pth", "pickle", "x.pyd", "pkl.gz"])
def test_pickles_are_refused(extension: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.fields\.evil=.*: is a pickle.*; store it as \.npy"):
        recipe({"evil": f"cls;{extension}"})


@pytest.mark.parametrize("extension", ["npy", "npz"])
def test_arrays_of_objects_are_not_unpickled(extension: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path(tmp_path / "owned").touch, ()

    evil, file = np.array([Evil()], dtype=object), io.BytesIO()
    (np.savez if extension == "npz" else np.save)(file, evil, allow_pickle=True)
    shard = write(tmp_path / "a.tar", {"a": {extension: file.getvalue()}, "b": {extension: pickle.dumps(Evil())}})
    samples = opened(shard, recipe({"x": extension}))
    for unit in (0, 1):
        with pytest.raises(DataError, match=f"'{extension}' cannot be decoded"):
            samples.read(unit, 0)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"no image", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_named_the_same_way_each_time(content: bytes, tmp_path: Path) -> None:
    """Pillow goes by content: PostScript would run another program."""
    shard = write(tmp_path / "a.tar", {"a": {"cls": b"1"}, "b": {"cls": b"1", "jpg": content}})
    text = "sample 'b': 'jpg' cannot be decoded: ValueError: is not an image of a known format (JPEG, "
    with pytest.raises(DataError) as caught:
        opened(shard, recipe({"image": "jpg"})).read(1, 0)
    assert text in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_image_is_named_with_its_place(kind: str, tmp_path: Path) -> None:
    whole = encoded(picture(1, 200, 200), kind)
    shard = write(
        tmp_path / "a.tar", {"a": {"jpg": whole, "cls": b"1"}, "b": {"cls": b"2", "jpg": whole[: len(whole) // 2]}}
    )
    samples = opened(shard, recipe({"image": "jpg", "label": "cls"}))
    assert samples.read(0, 0)["image"].shape == (3, 200, 200)
    with pytest.raises(DataError, match="sample 'b': 'jpg' cannot be decoded: ") as caught:
        samples.read(1, 0)
    error = caught.value
    assert (error.shard, error.key) == (str(shard), "b")
    assert error.byte is not None
    assert shard.read_bytes()[error.byte : error.byte + 4] == whole[:4]
    assert f"byte {error.byte}" in str(error)


@pytest.mark.parametrize(
    ("member", "content", "kind"),
    [("txt", b"words", "str"), ("json", b'{"a": 1}', "dict"), ("bin", b"raw", "bytes"), ("json", b'["a"]', "list")],
)
def test_what_is_no_tensor_is_named(member: str, content: bytes, kind: str, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"a": {member: content}})
    with pytest.raises(DataError, match=rf"sample 'a': field 'what' is not a tensor but of type {kind}: .*data\.maps"):
        opened(shard, recipe({"what": member})).read(0, 0)


def test_images_of_one_size(tmp_path: Path) -> None:
    sizes = {"wide": (60, 20), "high": (20, 45), "small": (7, 7), "exact": (16, 16)}
    shard = write(
        tmp_path / "a.tar", {name: {"png": encoded(picture(3, *size), "PNG")} for name, size in sizes.items()}
    )
    samples = opened(shard, recipe({"image": "png"}, ImageTensor(16, False, MEAN, STD)))
    for i, (width, height) in enumerate(sizes.values()):
        found = samples.read(i, draw=5)["image"]
        assert (found.shape, found.dtype) == ((3, 16, 16), torch.float32)
        scale = 16 / min(width, height)
        scaled = picture(3, width, height).resize((round(width * scale), round(height * scale)), Image.BILINEAR)
        left, top = (scaled.width - 16) // 2, (scaled.height - 16) // 2
        expected = (np.asarray(scaled.crop((left, top, left + 16, top + 16)), np.float64) / 255 - MEAN) / STD
        assert np.abs(found.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


def test_without_a_size_images_must_agree(tmp_path: Path) -> None:
    images = {name: {"png": encoded(picture(1, *size), "PNG")} for name, size in {"a": (9, 9), "b": (9, 8)}.items()}
    share = shared(opened(write(tmp_path / "a.tar", images), recipe({"image": "png"})), 2)
    with pytest.raises(DataError, match=r"'image' has .*resize or pad it"):
        share.step(0)


def test_augmentation_follows_from_the_draw_alone(shard: Path) -> None:
    samples = opened(shard, recipe({"image": "jpg;png"}, ImageTensor(24, True, MEAN, STD)))
    calm = opened(shard, recipe({"image": "jpg;png"}, ImageTensor(24, False, MEAN, STD)))
    draws = [(unit, draw) for unit in range(samples.n) for draw in (1, 2, 2**63 - 1)]
    alone = {one: samples.read(*one)["image"] for one in draws}
    assert torch.equal(samples.read(0, 0)["image"], calm.read(0, 0)["image"])  # an evaluation
    assert len({alone[0, draw].numpy().tobytes() for draw in (1, 2, 2**63 - 1)}) == 3
    copy = pickle.loads(pickle.dumps(samples))
    with ThreadPoolExecutor(4) as pool:
        for reader in (samples, copy):
            for one, row in zip(draws[::-1], pool.map(lambda one, r=reader: r.read(*one), draws[::-1]), strict=True):
                assert torch.equal(row["image"], alone[one])


def test_augmentation_takes_parts_and_flips() -> None:
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(64)[None] * 4, np.arange(64)[:, None] * 4
    made = ImageTensor(32, True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    views = [made(Image.fromarray(ramp), draw) for draw in range(1, 401)]
    flipped = [view[0, 0, 0] > view[0, 0, -1] for view in views]
    assert 140 < sum(flipped) < 260
    assert all(view[1, 0, 0] < view[1, -1, 0] for view in views)  # never upside down
    boxes = [random_box(200, 100, Random(draw)) for draw in range(2000)]
    assert all(0 <= left < right <= 200 and 0 <= top < bottom <= 100 for left, top, right, bottom in boxes)
    areas = np.array([(right - left) * (bottom - top) / 20000 for left, top, right, bottom in boxes])
    ratios = np.array([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert (0.07 < areas.min() < 0.1, 0.6 < areas.max() <= 1) == (True, True)
    assert (0.7 < ratios.min() < 0.8, 1.25 < ratios.max() < 1.4) == (True, True)
    assert {round(box[0]) == 0 for box in boxes} == {True, False}
    assert all(random_box(1000, 3, Random(draw))[1::2] == (0, 3) for draw in range(20))


def test_functions_by_name(shard: Path, package: str) -> None:
    fields = {"label": "cls", "meta": "json"}
    names = [f"{package}:weights", f"{package}:note", f"{package}:by_lambda"]
    samples = opened(shard, recipe(fields, maps=names, plugins=[package]))
    row = samples.read(3, draw=17)
    assert row.keys() == {"label", "weights", "drawn", "key"}
    assert row["weights"].tolist() == [3, 0.5]
    assert row["key"].item() == len("bird-003")
    first, second = row["drawn"].tolist()
    assert first != second  # each has a draw of its own
    assert all(0 <= draw < 2**63 for draw in (first, second))
    assert samples.read(8, draw=17)["drawn"].tolist() == [first, second]
    assert samples.read(3, draw=18)["drawn"].tolist() != [first, second]
    assert samples.read(3, draw=0)["drawn"].tolist() == [0, 0]  # an evaluation
    copy = pickle.loads(pickle.dumps(samples))  # though a lambda cannot be pickled
    assert copy.read(3, 17)["drawn"].tolist() == [first, second]


def test_functions_see_images_before_they_are_tensors(shard: Path, package: str) -> None:
    options: Any = {"maps": [f"{package}:square"], "plugins": [package]}
    samples = opened(shard, recipe({"image": "jpg;png"}, **options))
    assert {tuple(samples.read(i, i + 1)["image"].shape) for i in range(samples.n)} == {(3, 20, 20)}


@pytest.mark.parametrize(
    ("name", "plugins", "message"),
    [
        ("note", False, "package '{}' is not allowed; if you trust it, add run.plugins=[{}]"),
        ("nothing", True, "data.maps={}:nothing: cannot be imported: AttributeError"),
        ("no_function", True, "data.maps={}:no_function: is not a function"),
    ],
)
def test_functions_that_cannot_be_had(name: str, plugins: bool, message: str, package: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe({"label": "cls"}, maps=[f"{package}:{name}"], plugins=[package] if plugins else [])
    assert message.replace("{}", package) in str(caught.value)


def test_functions_that_fail(shard: Path, package: str) -> None:
    def samples(name: str) -> Samples:
        return opened(shard, recipe({"label": "cls"}, maps=[f"{package}:{name}"], plugins=[package]))

    assert samples("fails_on_three").read(2, 1)["label"].item() == 2
    with pytest.raises(DataError, match=r"bird-003.*fails_on_three: ZeroDivisionError: division by zero") as caught:
        samples("fails_on_three").read(3, 1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(DataError, match="forgets: TypeError: returned NoneType, but must return the sample"):
        samples("forgets").read(0, 1)
    with pytest.raises(ConfigError, match="needs: No module named 'no_such_package_anywhere'"):
        samples("needs").read(0, 1)


def shared(source: Samples, batch: int, **options: Any) -> RankStream:
    return RankStream(
        [OrderedSource(source, 4, 2, 7)], Mixture([(0, [1])]), Batches(batch), None, 7, ledger=True, **options
    )


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["threads", "processes"])
def test_the_stream_is_the_same_whoever_reads(processes: bool, shard: Path, package: str) -> None:
    fields, image = {"image": "jpg;png", "label": "cls"}, ImageTensor(24, True, MEAN, STD)
    source = opened(shard, recipe(fields, image, maps=[f"{package}:by_lambda"], plugins=[package]))
    expected = Stream(shared(source, 6), workers=0)
    stream = Stream(shared(source, 6), workers=2, processes=processes)
    try:
        for _ in range(8):  # four epochs
            ours, theirs = next(stream), next(expected)
            assert ours.entries == theirs.entries
            (batch,), (other) = ours.micro_batches, theirs.micro_batches[0]
            assert batch.keys() == other.keys() == {"image", "label", "drawn", "key", "draws"}
            assert all(torch.equal(batch[name], other[name]) for name in batch)
            assert batch["image"].shape == (6, 3, 24, 24)
    finally:
        stream.close()


def test_a_sample_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    contents = birds()
    contents["bird-004"]["jpg"] = contents["bird-004"]["jpg"][:300]
    shard = write(tmp_path / "birds.tar", contents)
    share = shared(opened(shard, recipe({"image": "jpg;png", "label": "cls"})), 12, tolerant=True)
    step = share.step(0)
    ((_, fault),) = step.faults
    assert fault.key == "bird-004"
    assert len(step.micro_batches[0]["draws"]) == 11


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~data.fields.label"], "data.fields: missing; name what to take"),
        (["data.fields={draws: cls}"], "data.fields.draws: this name is taken"),
        (["data.fields={a: 'jpg;'}"], "data.fields.a=jpg;: should be an extension"),
        (["data.image.augment=true"], "data.image.augment=true: needs data.image.size"),
        (["data.image.std=[1,0,1]"], "data.image.std.1=0: should be greater than 0"),
        ([], "model.name=gpt: takes text, which data.fields has none of: call it `tokens`"),
        ([], "objective.name=causal_lm: takes text"),
    ],
)
def test_configs_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["data=samples", "data.shards=x.tar", "data.fields={label: cls}", *overrides])
    assert message in str(caught.value)


def test_a_config_of_texts_and_one_of_images() -> None:
    assert continues_text(load(["data=samples", "data.shards=x.tar", "data.fields={tokens: txt}"]))
    fields = "data.fields={image: 'jpg;png'}"
    config = load(["data=samples", "data.shards=x.tar", fields, "data.maps=[a.b:c]"])  # which may make a text of it
    assert config.data.fields == {"image": "jpg;png"}
    made = Recipe.of(config.model_copy(update={"data": config.data.model_copy(update={"maps": []})}), ByteTokenizer())
    assert made.extensions == {"jpg", "png"}


def test_images_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # importing it fails
    assert recipe({"label": "cls"}).extensions == {"cls"}
    with pytest.raises(ConfigError, match=r"images need Pillow: pip install 'onecurve\[images\]'"):
        recipe({"image": "jpg;png"})


def test_from_memory_mapped_shards(shard: Path) -> None:
    made = recipe({"image": "jpg;png", "label": "cls", "vector": "vector.npy", "tokens": "txt"})
    mapped = Samples(Shards.open(str(shard), None, Storage(shard.parent / "cache", mmap=True)), made)
    for unit in (0, 11):
        ours, theirs = mapped.read(unit, 1), opened(shard, made).read(unit, 1)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    mapped.foresee([3, 4])
