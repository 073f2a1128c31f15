# SPDX-License-Identifier: Apache-2.0
"""Turn a GGUF file, once, into a float32 safetensors folder in the cache.

Reading GGUF takes ten times as long as reading safetensors, and a bfloat16 copy would move the logits, so the copy is
float32. The weights still lie on the grid of the file (4 bits for Q4_1): reports call them dequantized.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from calib.errors import ModelError
from calib.models.checkpoint import SOURCE_FILE
from calib.models.hashing import sha256_of_file
from calib.models.memory import available_bytes
from calib.models.quiet import quiet_transformers
from calib.models.reason import reason

__all__ = ["cache_root", "convert_gguf"]

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Where calib keeps what it can make again: `$CALIB_CACHE`, else `~/.cache/calib`."""
    return Path(os.environ.get("CALIB_CACHE") or Path.home() / ".cache" / "calib")


def convert_gguf(path: Path) -> Path:
    """The folder with the float32 safetensors copy of a GGUF file, made now unless the cache has it.

    The folder holds config, weights, tokenizer with chat template, generation config and `calib_source.json`.
    It appears complete or not at all.

    Args:
        path: one unsplit `.gguf` file that holds its own tokenizer.

    Raises:
        ModelError: not a readable GGUF file, an architecture that transformers cannot read, or no room on the disk.
    """
    digest = sha256_of_file(path)
    folder = cache_root() / "gguf" / digest
    if (folder / SOURCE_FILE).is_file():
        return folder
    quantization, elements = _inspect(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_room(folder.parent, needed=4 * elements, name=path.name)
    logger.info("%s: converting to float32 safetensors, once; about half a minute per 100 MB", path.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest[:16]}-", dir=folder.parent))
    try:
        _write(path, temporary)
        source = {"format": "gguf", "quantization": quantization, "file": path.name, "file_sha256": digest}
        (temporary / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        publish(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path.name}: cannot be converted ({reason(error)}); check the disk or set CALIB_CACHE"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _inspect(path: Path) -> tuple[str, int]:
    """Name of the quantization, e.g. Q4_1, and number of weights."""
    from gguf import GGUFReader, LlamaFileType

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise ModelError(f"{path.name}: truncated or not a GGUF file ({reason(error)}); fetch it again") from error
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise ModelError(f"{path.name}: one part of a split file; join the parts with llama-gguf-split --merge")
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    if "general.file_type" in reader.fields:
        name = LlamaFileType(int(reader.fields["general.file_type"].contents())).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_"), sizes.total()
    return (sizes.most_common(1)[0][0] if sizes else "unknown"), sizes.total()


def _check_room(folder: Path, *, needed: int, name: str) -> None:
    """The float32 copy passes through memory and stays on the disk of the cache."""
    free, available = shutil.disk_usage(folder).free, available_bytes("cpu")
    if needed > free:
        raise ModelError(
            f"{name}: its float32 copy needs {needed / 1e9:.1f} GB, the cache disk has {free / 1e9:.1f} GB free; "
            "set CALIB_CACHE to a larger disk"
        )
    if needed > available:
        raise ModelError(
            f"{name}: its float32 copy needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; "
            "convert it on a larger machine, or pass the safetensors checkpoint with --dtype bfloat16"
        )


def _write(path: Path, folder: Path) -> None:
    """Load with transformers, save as an ordinary checkpoint."""
    from transformers import AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # transformers draws its bar for dequantization on stderr whatever its own switch says.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
            model = _load(where)
        except OSError:
            raise
        except Exception as error:
            raise ModelError(
                f"{path.name}: transformers cannot read it ({reason(error)}); use a safetensors folder"
            ) from error
        _plain_copy(model).save_pretrained(folder)


def _load(where: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(**where)
    autos = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel)
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), AutoModel)
    return auto.from_pretrained(**where, config=config, dtype=torch.float32)


def _plain_copy(model: Any) -> Any:
    """The same weights in a model that knows nothing of GGUF: a model that was loaded from it refuses to be saved."""
    from transformers import PreTrainedConfig

    config: PreTrainedConfig = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    config.dtype = torch.float32
    # On "meta" no second set of weights is allocated: the loaded tensors are moved in.
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def publish(temporary: Path, folder: Path) -> None:
    """Rename into place; if another process was faster, its copy is as good."""
    try:
        temporary.replace(folder)
    except OSError:
        if not (folder / SOURCE_FILE).is_file():
            raise
