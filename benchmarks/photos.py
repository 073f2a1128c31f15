# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 with its batch norms folded, and the photos that two libraries ship as examples."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from assets import fetch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIZE = 224
DRAWINGS = {"chessboard_GRAY", "chessboard_RGB", "logo", "microaneurysms", "phantom", "color"}
"""No photos: test patterns, a logo, and a detail of 102 pixels."""


def photos() -> dict[str, Image.Image]:
    """All photos by name, in colour."""
    found = {}
    for asset in ("photos-scikit-image", "photos-scikit-learn"):
        for path in sorted(fetch(asset).iterdir()):
            if path.suffix in (".png", ".jpg") and path.stem not in DRAWINGS:
                found[path.stem] = Image.open(path).convert("RGB")
    return found


def tensor(image: Image.Image, corner: tuple[int, int] | None = None, *, mirrored: bool = False) -> torch.Tensor:
    """float32 ``[1, 3, 224, 224]``, as the model was trained: (value - 127) / 128.

    The shorter side is scaled to 256, then the middle, or what lies in a corner, is cut out.
    """
    width, height = image.size
    ratio = 256 / min(width, height)
    scaled = image.resize((max(SIZE, round(width * ratio)), max(SIZE, round(height * ratio))), Image.Resampling.BICUBIC)
    right, down = (0.5, 0.5) if corner is None else corner
    left, top = round((scaled.width - SIZE) * right), round((scaled.height - SIZE) * down)
    cut = scaled.crop((left, top, left + SIZE, top + SIZE))
    values = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
    values = (values.flip(-1) if mirrored else values).float()
    return ((values - 127) / 128).unsqueeze(0)


def views(image: Image.Image) -> Iterator[torch.Tensor]:
    """The middle and the four corners, each also mirrored."""
    for corner in (None, (0, 0), (0, 1), (1, 0), (1, 1)):
        for mirrored in (False, True):
            yield tensor(image, corner, mirrored=mirrored)


def efficientnet() -> nn.Module:
    """The model in evaluation mode; every convolution has taken over its batch norm."""
    folder = str(fetch("efficientnet-lite-code"))
    sys.path.insert(0, folder)
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.remove(folder)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(fetch("efficientnet-lite0"), weights_only=True))
    _fold(model, "_conv_stem", "_bn0")
    _fold(model, "_conv_head", "_bn1")
    for block in model._blocks:
        for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, conv):
                _fold(block, conv, norm)
    return model


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    with torch.no_grad():
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
    setattr(module, norm, nn.Identity())
