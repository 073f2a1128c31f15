# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound, opened from files, or from the bytes that a parquet file holds."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from calib.errors import CorpusError

__all__ = ["PICTURES", "SOUNDS", "Media", "open_picture", "open_sound"]

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SOUNDS = frozenset({".wav"})


@dataclass(frozen=True, slots=True)
class Media:
    """A picture or a sound.

    Attributes:
        path: the file; only a name where the content is held.
        content: encoded bytes, as parquet files of data sets hold them; None for a file.
    """

    path: Path
    content: bytes | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.path.name

    def open(self, where: str) -> BinaryIO:
        """The encoded bytes, to be read.

        Raises:
            CorpusError: there is no such file, or it cannot be read.
        """
        if self.content is not None:
            return io.BytesIO(self.content)
        if not self.path.is_file():
            raise CorpusError(f"{where}: no such file; a list names files relative to its own folder")
        try:
            return self.path.open("rb")
        except OSError as error:
            raise CorpusError(f"{where}: cannot be read ({error.strerror}); check its permissions") from error


def open_picture(media: Media, where: str) -> Any:
    """An RGB `PIL.Image`, decoded, turned upright as its EXIF data say.

    Args:
        media: the picture.
        where: what names it, for errors.

    Raises:
        CorpusError: Pillow is missing, or the file is missing or no picture.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise CorpusError(f"{where}: pictures need Pillow; pip install calib[images]") from error
    try:
        with media.open(where) as file, Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # a broken PNG raises SyntaxError
        broken = str(error) and "BytesIO" not in str(error) and "BufferedReader" not in str(error)
        reason = str(error).splitlines()[0] if broken else "it is of no known format"
        raise CorpusError(f"{where}: cannot be read as a picture ({reason}); replace it or take it out") from error


def open_sound(media: Media, rate: int, where: str) -> NDArray[np.float32]:
    """Samples of a PCM .wav file in [-1, 1], its channels averaged, float32 `[samples]` at `rate` per second.

    Another rate is changed by a polyphase filter (`scipy.signal.resample_poly`).

    Raises:
        CorpusError: the file is missing, is no PCM .wav, or holds no sample.
    """
    try:
        with media.open(where) as file, wave.open(file, "rb") as sound:
            channels, width, own, frames = sound.getparams()[:4]
            raw = sound.readframes(frames)
    except (wave.Error, EOFError, OSError) as error:
        reason = str(error) or "it ends too early"
        raise CorpusError(f"{where}: cannot be read as sound ({reason}); write it as a PCM .wav file") from error
    samples = _decoded(raw, width).reshape(-1, channels).mean(axis=1, dtype=np.float64)
    if not samples.size:
        raise CorpusError(f"{where}: holds no sound; replace it or take it out")
    if own != rate:
        from scipy.signal import resample_poly

        shared = gcd(own, rate)
        samples = resample_poly(samples, rate // shared, own // shared)
    return np.asarray(samples, np.float32)


def _decoded(raw: bytes, width: int) -> NDArray[np.float64]:
    if width == 1:  # the only unsigned one
        return (np.frombuffer(raw, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8)[: len(raw) // 3 * 3].reshape(-1, 3)
        return padded.reshape(-1).view("<i4").astype(np.float64) / 2**31
    return np.frombuffer(raw[: len(raw) // width * width], f"<i{width}").astype(np.float64) / 2.0 ** (8 * width - 1)
