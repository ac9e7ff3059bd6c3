# SPDX-License-Identifier: Apache-2.0
"""Images in a folder or a ZIP, decoded into one array."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pfgm_kernels.training.data.checks import DataError, blaming, damaged, fits, image_size
from pfgm_kernels.training.data.dataset import DataSet
from pfgm_kernels.training.data.listing import Listing, listed
from pfgm_kernels.training.data.sources import Source

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
CHUNK = 256
"""Images that are decoded at a time, and may wait for their turn to be stored."""


def load_images(
    name: str, source: Source, held_out: float | None, progress: Callable[[float], None]
) -> DataSet:
    listing = listed(source, held_out)
    return listing.split.data_set(name, _read(source, listing, progress), listing.labels)


def _read(source: Source, listing: Listing, progress: Callable[[float], None]) -> np.ndarray:
    """uint8 (N, H, W) where all are grey, else (N, 3, H, W), each image in its place."""
    names, places = listing.names, listing.split.places
    stored = np.empty(0, np.uint8)

    def decoded(name: str) -> np.ndarray:
        return decode(source.read(name), source.where(name))

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            for row, image in enumerate(pool.map(decoded, chunk), start):
                if row == 0:
                    stored = _empty(source, (len(names), *image.shape))
                if image.shape[-2:] != stored.shape[-2:]:
                    raise DataError(
                        f"{source.where(names[row])}: expected {_size(stored)} pixels as in "
                        f"{names[0]}, got {_size(image)}"
                    )
                if image.ndim == stored.ndim:  # the first in colour among grey ones
                    grey, stored = stored, _empty(source, (len(names), *image.shape))
                    stored[places[:row]] = grey[places[:row], None]
                stored[places[row]] = image
            progress(min(1.0, (start + CHUNK) / len(names)))
    return stored


def decode(content: bytes, where: str) -> np.ndarray:
    """The pixels of one image, uint8: grey (H, W), or RGB (3, H, W).

    What converts without loss and in one way only does: bilevel images and those of 2 or 4 bits to
    grey, palettes to RGB; an alpha channel that is opaque everywhere is dropped, and orientation by
    EXIF applied; colour profiles are not. ValueError for the rest: transparency, 16 bits, CMYK,
    animations.
    """
    with blaming(where, "an image"):
        with _opened(content, where) as image:
            _check(image, where)
            image.verify()  # the checksums of a PNG, which decoding skips
        with _opened(content, where) as image:
            oriented = ImageOps.exif_transpose(image)
            plain = _without_alpha(oriented, where)
            plain = plain.convert("L" if plain.mode in ("1", "L") else "RGB")
            pixels = np.asarray(plain)
    return pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _opened(content: bytes, where: str) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise damaged(where, f"an image ({kinds})", f"{len(content)} other bytes") from None


def _check(image: ImageFile.ImageFile, where: str) -> None:
    """Looks at the header alone, before anything is decompressed."""
    image_size(where, image.height, image.width)
    if (frames := getattr(image, "n_frames", 1)) != 1:
        raise DataError(f"{where}: expected one image, got {frames} frames")
    # Pillow reads a PNG of three 16-bit channels as 8-bit, without a word.
    deep = image.format == "PNG" and str(image.tile[0][3]).endswith("16B")
    if deep or image.mode not in MODES:
        kind = "16 bits a channel" if deep or image.mode.startswith("I") else image.mode
        raise DataError(f"{where}: expected 8-bit grey or RGB pixels, got {kind}")


def _without_alpha(image: Image.Image, where: str) -> Image.Image:
    if "transparency" in image.info or image.mode == "PA":
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode not in ("LA", "RGBA"):
        return image
    if image.getchannel("A").getextrema() != (255, 255):
        raise DataError(f"{where}: expected opaque pixels, got transparent ones")
    return image.convert(image.mode[:-1])


def _empty(source: Source, shape: tuple[int, ...]) -> np.ndarray:
    fits(source.path, shape, 1)
    return np.empty(shape, np.uint8)


def _size(image: np.ndarray) -> str:
    return " × ".join(map(str, image.shape[-2:]))
