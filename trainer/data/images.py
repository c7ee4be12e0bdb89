"""Decoded images: from the bytes of a file to pixels, from pixels to float32 [3, H, W]. Needs Pillow."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset((
    "apng", "bmp", "dib", "gif", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx", "pbm", "pgm",
    "png", "pnm", "ppm", "tif", "tiff", "webp",
))  # fmt: skip
# Pillow goes by content, whatever the extension says, and hands some formats (EPS) to other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_SIXTEEN_BITS_AS_I = ("PNG", "PPM")  # formats whose 16 bits Pillow has had in this mode
_SCALES, _RATIOS, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random crop: share of the area, width to height

Box = tuple[float, float, float, float]


def require_pillow(key: str) -> None:
    """Raises ConfigError under `key` if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigError(f"{key}: images need Pillow: pip install 'onecurve[images]'") from None


def decode(content: bytes, max_bytes: int) -> Image:
    """Decodes an RGB image, as `webdataset.decode("pil")` does. Raises ValueError or OSError if it is not a whole
    image, its pixels would take more than `max_bytes`, or they are not known to be colors."""
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(content), formats=_FORMATS)
    except PIL.UnidentifiedImageError:
        raise ValueError(f"is not an image of a known format ({', '.join(_FORMATS)})") from None
    if (size := image.width * image.height * 3) > max_bytes:
        raise ValueError(f"has {image.width} x {image.height} pixels, which take {size} bytes, more than {max_bytes}")
    image.load()
    return _rgb(image)


def is_image(value: Any) -> bool:
    """Returns whether the value is a Pillow image."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


@dataclass(frozen=True)
class ImageTensor:
    """Converts an image to float32 [3, H, W]: (value from 0 to 1 - `mean`) / `std`, by channel.

    `size`: H and W; the shorter side is scaled to it, the center is cut out. None: as large as the image is. With
    `augment` a random part of the image (8 % to 100 % of its area, 3:4 to 4:3) is scaled to `size`, and half of the
    images are flipped from left to right. Randomness follows from `draw` alone; if that is 0, nothing is random.
    """

    size: int | None
    augment: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image, draw: int) -> npt.NDArray[np.float32]:
        import PIL.Image

        random = Random(draw) if self.augment and draw else None
        image = _rgb(image)
        if self.size is not None:
            box = random_box(image.width, image.height, random) if random else center_box(image.width, image.height)
            image = image.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR, box=box)
        if random and random.random() < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.empty((3, image.height, image.width), np.float32)  # computed in place: ten times as fast as copies
        np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(255), out=pixels)
        pixels -= np.array(self.mean, np.float32)[:, None, None]
        pixels /= np.array(self.std, np.float32)[:, None, None]
        return pixels


def _rgb(image: Image) -> Image:
    """Returns the image with 8 bits a channel. Drops transparency, as webdataset and torchvision do. Raises ValueError
    where Pillow would clip values above 255."""
    import PIL.Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS_AS_I):
        gray = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65,535 becomes 255
        image = PIL.Image.fromarray(gray.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are numbers of 32 bits (mode {image.mode}) of no known range: store 8 or 16 bits a channel, "
            "or an array (.npy)"
        )
    return image.convert("RGB")  # a copy


def center_box(width: int, height: int) -> Box:
    """Returns the largest square in the middle: (left, top, right, bottom)."""
    side = min(width, height)
    return _center(width, height, side, side)


def random_box(width: int, height: int, random: Random) -> Box:
    """Returns a random part of the image, drawn as torchvision's RandomResizedCrop does."""
    narrowest, widest = map(math.log, _RATIOS)
    for _ in range(_ATTEMPTS):
        area = width * height * (_SCALES[0] + random.random() * (_SCALES[1] - _SCALES[0]))
        ratio = math.exp(narrowest + random.random() * (widest - narrowest))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        left, top = int(random.random() * (width - w + 1)), int(random.random() * (height - h + 1))
        if 0 < w <= width and 0 < h <= height:
            return left, top, left + w, top + h
    return _center(width, height, min(width, height * _RATIOS[1]), min(height, width / _RATIOS[0]))  # very long


def _center(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
