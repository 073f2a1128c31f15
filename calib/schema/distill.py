# SPDX-License-Identifier: Apache-2.0
"""Files of distillation: the recipe that `calib distill run` reads, and the classifiers that it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from calib.schema.provenance import Strict
from calib.schema.recipe import RecipeMetadata

__all__ = [
    "DataRecipe",
    "DistillRecipe",
    "FrameworkRecipe",
    "ImageInput",
    "McmiRecipe",
    "NetworkFile",
    "OptimiserRecipe",
    "ProtocolRecipe",
    "StudentRecipe",
    "TeacherRecipe",
    "TrainingRecipe",
]


class ImageInput(Strict):
    """What an image classifier expects."""

    size: int | None = Field(default=32, ge=1, description="Height and width in pixels; None: as the images are")
    channels: int = Field(default=3, ge=1, description="1 or 3 for images; the length of a vector otherwise")
    mean: list[float] = Field(default=[0.5], min_length=1)
    std: list[float] = Field(default=[0.5], min_length=1)


class NetworkFile(Strict):
    """`classifier.json` beside `model.safetensors`."""

    format: Literal["calib.classifier"] = "calib.classifier"
    version: Literal["1.0"] = "1.0"
    network: str
    classes: int = Field(ge=2)
    class_names: list[str]
    image: ImageInput


class OptimiserRecipe(Strict):
    """Optimiser and schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["cosine", "steps", "constant"] = "steps"


class TrainingRecipe(Strict):
    """One training. `epochs` are of the whole training data: a few-shot student takes as many steps."""

    epochs: int = Field(default=240, ge=1)
    batch_size: int = Field(default=64, ge=2)
    optimiser: OptimiserRecipe = Field(default_factory=OptimiserRecipe)
    augment: bool = Field(default=False, description="Random shift by an eighth and horizontal flip of images")


class DataRecipe(Strict):
    """Where labelled samples come from. Validation data are split off the training data, stratified."""

    source: str = Field(description="hub:OWNER/NAME, folder or file; see `calib distill cmi --help`")
    train_split: str = "train"
    test_split: str = "test"
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1, description="At most so many training samples, stratified")
    image: ImageInput = Field(default_factory=ImageInput)
    max_length: int = Field(default=128, ge=1, description="Tokens of a text")


class TeacherRecipe(Strict):
    """A network trained here, or a checkpoint."""

    network: str | None = Field(default=None, description="Name of a built-in network, trained by log-likelihood")
    model: str | None = Field(default=None, description="Hub id or folder of a trained classifier")
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)

    @model_validator(mode="after")
    def _one_source(self) -> TeacherRecipe:
        if (self.network is None) == (self.model is None):
            raise ValueError("teacher needs either network or model")
        return self


class McmiRecipe(Strict):
    """The fine-tuning that raises CMI. With several strengths one is chosen on validation data."""

    strengths: list[float] = Field(default=[0.25], min_length=1)
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=2)
    optimiser: OptimiserRecipe = Field(default_factory=lambda: OptimiserRecipe(learning_rate=0.05, schedule="cosine"))
    clip_norm: float = Field(default=5.0, gt=0)
    refresh: Literal["epoch", "ema"] = "epoch"
    ema_momentum: float = Field(default=0.95, ge=0, lt=1)
    control: bool = Field(default=True, description="Also fine-tune with lambda = 0, the fair baseline")

    @model_validator(mode="after")
    def _strengths_are_possible(self) -> McmiRecipe:
        if any(not 0 < strength < 1 for strength in self.strengths):
            raise ValueError("strengths must lie between 0 and 1; the control with 0 is run anyway")
        return self


class FrameworkRecipe(Strict):
    """r CE + a T^2 KL(teacher ‖ student) + b feature loss. Weights left out are those that the authors used."""

    name: str
    cross_entropy: float | None = Field(default=None, ge=0, description="r")
    soft_targets: float | None = Field(default=None, ge=0, description="a")
    feature: float | None = Field(default=None, ge=0, description="b")
    temperature: float = Field(default=4.0, gt=0)


class StudentRecipe(Strict):
    """A network trained here, or a checkpoint to start from."""

    network: str | None = None
    model: str | None = None
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    frameworks: list[FrameworkRecipe] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_source(self) -> StudentRecipe:
        if (self.network is None) == (self.model is None):
            raise ValueError("student needs either network or model")
        return self


class ProtocolRecipe(Strict):
    """What the student gets to see."""

    kind: Literal["full", "few-shot", "zero-shot"] = "full"
    shares: list[float] = Field(default=[0.05, 0.1, 0.15, 0.25, 0.5, 0.75], description="few-shot: of each class")
    omitted: list[list[int | str]] = Field(default_factory=list, description="zero-shot: sets of classes left out")

    @model_validator(mode="after")
    def _zero_shot_leaves_something_out(self) -> ProtocolRecipe:
        if self.kind == "zero-shot" and not all(self.omitted or [[]]):
            raise ValueError("zero-shot needs omitted: one or more sets of classes")
        if any(not 0 < share <= 1 for share in self.shares):
            raise ValueError("shares must lie in (0, 1]")
        return self


class DistillRecipe(Strict):
    """The whole of a recipe for `calib distill run`."""

    metadata: RecipeMetadata
    task: Literal["image-classification", "text-classification"]
    data: DataRecipe
    teacher: TeacherRecipe
    mcmi: McmiRecipe = Field(default_factory=McmiRecipe)
    student: StudentRecipe
    protocol: ProtocolRecipe = Field(default_factory=ProtocolRecipe)
    temperatures: list[float] = Field(default=[1.0], min_length=1, description="CMI of the teachers at each")
    seeds: list[int] = Field(default=[0], min_length=1)
