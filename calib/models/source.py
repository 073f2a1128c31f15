# SPDX-License-Identifier: Apache-2.0
"""From what the user typed to a folder of files: a hub id is downloaded, a GGUF file converted, a folder taken."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from calib.errors import ModelError, UsageError
from calib.models.gguf import convert_gguf
from calib.models.reason import reason

__all__ = ["Source", "locate"]

# `name` or `namespace/name`, as the hub allows them.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
# Only what transformers reads from the top folder: no ONNX copies, no second set of weights.
DESCRIPTION_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
SAFETENSORS_PATTERNS = ["model.safetensors", "model-*-of-*.safetensors"]
PICKLE_PATTERNS = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]


@dataclass(frozen=True)
class Source:
    """Where the files of a model are."""

    folder: Path
    name: str
    revision: str | None = None
    hub_id: str | None = None


def locate(reference: str, *, revision: str | None = None, with_code: bool = False) -> Source:
    """Find the folder that holds the files of a model.

    Args:
        reference: hub id, local folder, `.gguf` file, or a folder with exactly one `.gguf` file.
        revision: branch, tag or commit of a hub id.
        with_code: also download the Python files of a hub repository (they are not run here).

    Raises:
        ModelError: nothing is there, the hub cannot be reached, or a GGUF file cannot be converted.
        UsageError: a revision was given for local files.
    """
    path = Path(reference).expanduser()
    if reference and path.exists():
        if revision is not None:
            raise UsageError(
                f"revision {revision}: {reference} is on disk, only a hub id has revisions; drop --revision"
            )
        return _local(path, reference)
    looks_like_path = reference.startswith((".", "~", "/")) or path.suffix in {".gguf", ".safetensors", ".bin"}
    if looks_like_path or not HUB_ID.fullmatch(reference):
        raise ModelError(
            f"model {reference!r}: no such file or folder; pass a folder with config.json, a .gguf file or a hub id"
        )
    folder = _download(reference, revision, with_code=with_code)
    # A snapshot folder is named by the commit that the revision resolved to.
    return Source(folder=folder, name=reference, revision=folder.name, hub_id=reference)


def _local(path: Path, reference: str) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {reference}: a file that is not .gguf; pass the folder that holds config.json")
        return Source(folder=convert_gguf(path), name=path.name)
    if (path / "config.json").is_file():
        return Source(folder=path, name=path.resolve().name)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return Source(folder=convert_gguf(found[0]), name=found[0].name)
    if found:
        names = ", ".join(p.name for p in found[:4])
        raise ModelError(f"model {reference}: holds {len(found)} GGUF files ({names}); pass one of them")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"model {reference}: is an adapter without its model; merge it and pass the merged folder")
    raise ModelError(f"model {reference}: no config.json in this folder; pass the folder of a checkpoint")


def _download(hub_id: str, revision: str | None, *, with_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(patterns: list[str]) -> Path:
        # "*/*" keeps the folders below the top one out, whatever their names.
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        folder = fetch(DESCRIPTION_PATTERNS + SAFETENSORS_PATTERNS + (["*.py"] if with_code else []))
        if not any(folder.glob("*.safetensors")):
            fetch(PICKLE_PATTERNS)
    except GatedRepoError as error:
        raise ModelError(f"model {hub_id}: the hub asks for a login or a licence click; run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {hub_id}: the hub has no revision {revision!r}; check --revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"model {hub_id}: neither a local path nor a model of the hub; check the spelling") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {hub_id}: no such local path, and the hub could not be reached; pass a local folder or go online"
        ) from error
    except Exception as error:
        # The HTTP library below the hub client changes with its version, and with it what a broken transfer raises.
        raise ModelError(
            f"model {hub_id}: the download failed ({reason(error)}); try again or pass a local folder"
        ) from error
    return folder
