# SPDX-License-Identifier: Apache-2.0
"""Where a result came from: the model, the corpus and the run, each with the hashes that identify it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CorpusProvenance", "ModelProvenance", "Producer", "RunProvenance", "SourceProvenance", "Strict"]


class Strict(BaseModel):
    """A record of a file that leaves the program: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Producer(Strict):
    """The program that wrote a file."""

    name: str = "calib"
    version: str


class ModelProvenance(Strict):
    """One checkpoint, identified by the content of its files."""

    name: str = Field(description="Reference as the user gave it: hub id, folder name or GGUF file name")
    revision: str | None = Field(default=None, description="Resolved hub revision (commit), if any")
    architecture: str = Field(description="Class that ran, e.g. LlamaForCausalLM")
    model_type: str = Field(description="`model_type` of the configuration, or 'module' for a plain nn.Module")
    task: str = Field(description="Task name as optimum's TasksManager calls it, e.g. text-generation")
    dtype: str = Field(description="dtype of the weights while measured, e.g. float32")
    parameters: int = Field(ge=0, description="Number of parameters, tied ones once")
    source_format: str = Field(description="safetensors | pytorch | gguf:<type> | memory")
    config_sha256: str
    tokenizer_sha256: str | None = None
    weights_sha256: dict[str, str] = Field(description="File name -> sha256 of every weight file, sorted by name")
    parent: str | None = Field(default=None, description="Fingerprint of the checkpoint that cures were applied to")

    @property
    def fingerprint(self) -> str:
        """sha256 over configuration and weight hashes: equal exactly for equal checkpoints."""
        import hashlib

        text = "\n".join([self.config_sha256, *(f"{k}={v}" for k, v in sorted(self.weights_sha256.items()))])
        return hashlib.sha256(text.encode()).hexdigest()


class SourceProvenance(Strict):
    """One source of calibration text."""

    name: str = Field(description="File name, folder name, hub id, or 'builtin'")
    domain: str
    sha256: str = Field(description="Hash of the documents read, in order")
    documents: int = Field(ge=0)
    licence: str | None = None


class CorpusProvenance(Strict):
    """The exact token blocks that were run."""

    sources: list[SourceProvenance]
    layout: Literal["blocks", "documents", "examples", "user"] = Field(
        description="blocks: equal-length blocks of one document each; documents: one padded document per row; "
        "examples: pictures, sound or pairs of text, each as the model's processor makes them; "
        "user: the user's own loop"
    )
    blocks: int = Field(ge=0)
    max_length: int = Field(ge=0)
    tokens: int = Field(ge=0, description="Valid tokens; padding never counts")
    documents: int = Field(ge=0)
    domains: list[str]
    blocks_per_domain: dict[str, int]
    seed: int
    add_bos: bool
    chat_template_sha256: str | None = Field(default=None, description="Set exactly when the template was applied")
    tokenizer_sha256: str | None = None
    content_sha256: str = Field(description="Hash of token ids, lengths, documents and domains in order; of examples, "
                                "of every argument of the model")  # fmt: skip
    holds: dict[str, int] = Field(default_factory=dict, description="Of examples: how many of image, audio, target")


class RunProvenance(Strict):
    """How the measurement was taken."""

    command: str
    started: str | None = Field(default=None, description="UTC, ISO 8601; absent from anything that is hashed")
    seconds: float | None = None
    device: str
    dtype: str
    batch_size: int
    batches: list[int] = Field(description="Indices of the batches of the frozen plan that were run, ascending")
    planned_batches: int
    sink_positions: int
    attention: str | None = None
    kernel: str
    threads: int
    sites_pattern: list[str]
    ignore_pattern: list[str]
    versions: dict[str, str]
    protocol: str | None = None
    min_expert_tokens: int = Field(default=1, description="Fewest tokens of an expert for its gate to hold")
    generate: int = Field(default=0, description="Tokens that each block was continued by, greedily, and measured")
    decoder: dict[str, int] = Field(
        default_factory=dict,
        description="Encoder-decoder models: rows whose decoder read their own target, and rows whose decoder read "
        "what the model writes greedily (greedy)",
    )
    force_experts: bool = Field(default=False, description="Experts without tokens were measured on some, and marked")
