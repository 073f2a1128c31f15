# SPDX-License-Identifier: Apache-2.0
"""Eigen-CAM: where a network looks, without a class and without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.distill.features import FeaturePoints, find_features, look
from calib.distill.task import Task
from calib.errors import UsageError
from calib.models.evaluating import evaluating

__all__ = ["CamComparison", "compare_cams", "covered_area", "eigen_cam", "save_cams"]


_HEADER = 18
"""Pixels above a picture, for names."""


@dataclass(frozen=True)
class CamComparison:
    """Maps float32 `[n, h, w]` in 0..1 by teacher, and the mean covered area of each."""

    maps: dict[str, Tensor]
    area: dict[str, float]


def eigen_cam(activations: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Projection of the last convolution's output on its first principal direction over channels.

    For each image A is `[hw, c]`; with the right singular vector v of the largest singular value (A as it is, not
    centred) the map is A v, its sign such that its sum is positive, negative parts cut off, enlarged bilinearly, over
    its maximum (Muhammad & Yeasin 2020, arXiv 2008.00299).

    Args:
        activations: `[n, c, h, w]`.
        size: height and width of the result; as the activations if absent.

    Returns:
        float32 `[n, h, w]` in 0..1; all 0 where the activations are.
    """
    rows = activations.detach().float().flatten(2).transpose(1, 2)
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    projected = (rows @ right[:, 0, :, None]).squeeze(2)
    projected = projected * torch.where(projected.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    maps = projected.clamp(min=0).view(len(rows), 1, *activations.shape[2:])
    if size is not None:
        maps = nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    peaks: Tensor = maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return (maps / peaks).squeeze(1)  # type: ignore[no-any-return]


def covered_area(maps: Tensor, threshold: float = 0.5) -> Tensor:
    """Share of the pixels above `threshold` times the maximum, float32 `[n]`.

    Args:
        maps: `[n, h, w]` in 0..1.
        threshold: 0.5 is half the maximum.
    """
    return (maps > threshold * maps.amax(dim=(1, 2), keepdim=True)).float().mean(dim=(1, 2))


@torch.no_grad()
def compare_cams(
    teachers: Mapping[str, nn.Module], batch: Any, task: Task, points: FeaturePoints | None = None
) -> CamComparison:
    """Maps of several teachers of one architecture on one batch of images.

    Args:
        teachers: name -> model.
        batch: (images `[n, c, h, w]`, labels).
        task: how they read it.
        points: where the last map is; found in the first teacher if absent.

    Raises:
        UsageError: no feature maps of images.
    """
    maps, area = {}, {}
    size = batch[0].shape[2:]
    for name, model in teachers.items():
        points = points or find_features(model, task, batch)
        with evaluating(model):
            seen = look(model, task, batch, points)
        if not seen.maps or seen.maps[-1].shape[3] == 1:
            raise UsageError(f"eigen-cam of {name}: no feature maps of images; pass a convolutional network")
        maps[name] = eigen_cam(seen.maps[-1], (int(size[0]), int(size[1]))).cpu()
        area[name] = float(covered_area(maps[name]).mean())
    return CamComparison(maps, area)


def save_cams(path: Path, images: Tensor, comparison: CamComparison, scale: int = 4, rows: int = 8) -> None:
    """Writes a PNG: one row per image, the image first and then its map in red over grey for each teacher.

    The name of a teacher stands above its column.

    Args:
        path: of the picture.
        images: `[n, c, h, w]`, any range; each is stretched to 0..1.
        comparison: of these images.
        scale: pixels of the picture per pixel of an image.
        rows: the first so many images.

    Raises:
        UsageError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UsageError(f"{path}: writing a picture needs Pillow; pip install 'calib[distill]'") from error
    images = images[:rows]
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp(min=1e-12)).cpu()
    grey = shown.mean(dim=1)
    first = shown if shown.shape[1] == 3 else grey[:, None].expand(-1, 3, -1, -1)
    columns = [first]
    for heat in comparison.maps.values():
        faded = grey * (1 - heat[:rows])
        columns.append(torch.stack([faded + heat[:rows], faded, faded], dim=1))
    picture = torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2)
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    image = Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))
    named = Image.new("RGB", (width * scale, height * scale + _HEADER), "white")
    named.paste(image.resize((width * scale, height * scale), Image.Resampling.NEAREST), (0, _HEADER))
    column = width * scale // len(columns)
    for number, name in enumerate(("image", *comparison.maps)):
        place = (column * number + column // 2, _HEADER // 2)
        ImageDraw.Draw(named).text(place, name, fill="black", font=ImageFont.load_default(12), anchor="mm")
    named.save(path)
