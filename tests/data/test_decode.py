"""What a member claims to be: more than its bytes account for is bad data, before memory is taken for it."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_samples import array, encoded, opened, recipe, shared, write
from trainer.data import decode
from trainer.errors import DataError


def header(shape: tuple[int, ...], version: tuple[int, int] = (1, 0)) -> bytes:
    """Of a .npy file, without what it announces."""
    file = io.BytesIO()
    about = {"descr": "<f8", "fortran_order": False, "shape": shape}
    (np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0)(file, about)
    content = bytearray(file.getvalue())
    content[6:8] = version
    return bytes(content)


def npz(**members: bytes) -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(f"{name}.npy", content)
    return file.getvalue()


def empty_png(width: int, height: int) -> bytes:
    """One that says how large it is, and no more."""
    size = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (size, pixels, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


CLAIMS = {
    "npy": (header((1 << 50,)), "its header tells of 9007199254740992 bytes, but 0 follow"),
    "v2.npy": (header((1 << 30, 1 << 20), (2, 0)), "its header tells of"),
    "v3.npy": (header((40,), (3, 0)) + bytes(319), "its header tells of 320 bytes, but 319 follow"),
    "npz": (npz(x=header((1 << 50,))), "the header of x.npy tells of more bytes than are there"),
    "png": (empty_png(13_000, 13_000), "has 13000 x 13000 pixels, which take 507000000 bytes, more than 268435456"),
}


@pytest.mark.parametrize("extension", CLAIMS)
def test_what_is_claimed_is_compared_with_what_is_there(extension: str, tmp_path: Path) -> None:
    content, cause = CLAIMS[extension]
    shard = write(tmp_path / "a.tar", {"good": {"cls": b"1"}, "bad": {extension: content}})
    with pytest.raises(DataError) as caught:
        opened(shard, recipe({"x": extension})).read(1, 0)
    assert f"sample 'bad': '{extension}' cannot be decoded: ValueError: {cause}" in str(caught.value)
    assert (caught.value.shard, caught.value.key) == (str(shard), "bad")
    good = {"x": {extension: content}, "y": {"cls": b"1"}, "z": {"cls": b"2"}}
    samples = opened(write(tmp_path / "b.tar", good), recipe({"x": f"{extension};cls"}))
    ((_, fault),) = shared(samples, 3, tolerant=True).step(0).faults  # quarantine goes on
    assert fault.key == "x"


@pytest.mark.parametrize("extension", ["txt.gz", "json.gz", "npy.gz", "npz"])
def test_bombs_are_not_unpacked(extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MiB of zeros takes 1 KB; real text no less than a sixteenth of itself."""
    monkeypatch.setattr(decode, "UNPACKED_BYTES", 100_000)
    zeros = array(np.zeros(1 << 17)) if "np" in extension else b"0" * (1 << 20)
    content = npz(x=zeros) if extension == "npz" else gzip.compress(zeros)
    shard = write(tmp_path / "a.tar", {"bad": {extension: content}})
    with pytest.raises(DataError, match=rf"sample 'bad': '{extension}' cannot be decoded: ValueError: unpacks to"):
        opened(shard, recipe({"x": extension})).read(0, 0)
    noise = np.random.default_rng(1).integers(0, 4, 1 << 18, np.uint8).tobytes()  # 2 bits in 8
    assert decode.unpacked("bin.gz", gzip.compress(noise)) == noise  # large, but not out of nothing


def test_arrays_are_numpys(tmp_path: Path) -> None:
    values = np.arange(12, dtype=">i2").reshape(3, 4)
    assert np.array_equal(decode.decode("a.npy", array(values)), values)
    assert np.array_equal(decode.decode("npy.gz", gzip.compress(array(values.T))), values.T)
    fields, file = np.zeros(3, [("ü", "<f4"), ("b", "<i8")]), io.BytesIO()
    np.lib.format.write_array(file, fields, version=(3, 0))
    assert decode.decode("npy", file.getvalue()).dtype == fields.dtype
    assert decode.decode("npy", array(np.zeros((0, 1 << 40)))).shape == (0, 1 << 40)
    found = decode.decode("npz", npz(a=array(values), b=array(values[0])))
    assert {name: value.tolist() for name, value in found.items()} == {"a": values.tolist(), "b": values[0].tolist()}


def test_no_memory_for_a_sample_is_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hungry_package.py").write_text(
        "import numpy\n\ndef grow(sample, draw):\n    sample['label'] = numpy.zeros(1 << 50)\n    return sample\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shard = write(tmp_path / "a.tar", {"a": {"cls": b"1"}})
    hungry = recipe({"label": "cls"}, maps=["hungry_package:grow"], plugins=["hungry_package"])
    with pytest.raises(
        DataError, match=r"a\.tar: byte \d+: sample 'a': data\.maps hungry_package:grow: .*Unable to all"
    ):
        opened(shard, hungry).read(0, 0)


VALUES = np.array([[0, 128, 129, 257], [4000, 24000, 65534, 65535]], np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_grey_of_16_bits_keeps_its_range(kind: str, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"a": {kind: encoded(Image.fromarray(VALUES), kind.upper())}})
    found = opened(shard, recipe({"image": kind})).read(0, 0)["image"]
    for channel in found:
        assert np.array_equal((channel * 255).round().numpy(), (VALUES / 257).round())


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_of_no_known_range_are_bad_data(dtype: Any, mode: str, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"a": {"tif": encoded(Image.fromarray(VALUES.astype(dtype)), "TIFF")}})
    with pytest.raises(DataError, match=rf"sample 'a': 'tif' cannot be decoded: .*\(mode {mode}\) of no known range"):
        opened(shard, recipe({"image": "tif"})).read(0, 0)


def test_transparency_is_dropped(tmp_path: Path) -> None:
    """As webdataset and torchvision do."""
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    found = opened(write(tmp_path / "a.tar", {"a": {"png": encoded(red, "PNG")}}), recipe({"image": "png"})).read(0, 0)
    assert found["image"][:, 0, 0].tolist() == [1, 0, 0]
