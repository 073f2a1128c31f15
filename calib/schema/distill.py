# SPDX-License-Identifier: Apache-2.0
"""Files of distillation: the recipe that `calib distill run` reads, and the classifiers that it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from calib.schema.provenance import Producer, Strict
from calib.schema.recipe import RecipeMetadata

__all__ = [
    "DataRecipe",
    "DistillRecipe",
    "DistillReport",
    "FrameworkRecipe",
    "ImageInput",
    "McmiRecipe",
    "ModelRecipe",
    "NetworkFile",
    "OptimiserRecipe",
    "PairedGain",
    "ProtocolRecipe",
    "StudentRecipe",
    "StudentRow",
    "TeacherRecipe",
    "TeacherRow",
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


class ModelRecipe(Strict):
    """Where a model comes from: exactly one of network, encoder and model."""

    network: str | None = Field(default=None, description="Built-in image network with fresh weights, trained here")
    encoder: str | None = Field(default=None, description="Text encoder that gets a fresh head, trained here")
    layers: int | None = Field(default=None, ge=1, description="Of an encoder, keep the first so many layers")
    model: str | None = Field(default=None, description="Hub id or folder of a trained classifier")
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if sum(source is not None for source in (self.network, self.encoder, self.model)) != 1:
            raise ValueError("exactly one of network, encoder and model is needed")
        if self.layers is not None and self.encoder is None:
            raise ValueError("layers belongs to an encoder")
        return self


class TeacherRecipe(ModelRecipe):
    """A model trained here by log-likelihood, or a checkpoint taken as it is."""


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


class StudentRecipe(ModelRecipe):
    """A model to start from and the frameworks to train it by; `ce`, no teacher, is always among them."""

    frameworks: list[FrameworkRecipe] = Field(min_length=1)


class ProtocolRecipe(Strict):
    """What the student gets to see."""

    kind: Literal["full", "few-shot", "zero-shot"] = "full"
    shares: list[float] = Field(default=[0.05, 0.1, 0.15, 0.25, 0.5, 0.75], description="few-shot: of each class")
    omitted: list[list[int | str]] = Field(default_factory=list, description="zero-shot: sets of classes left out")

    @model_validator(mode="after")
    def _zero_shot_leaves_something_out(self) -> ProtocolRecipe:
        if self.kind == "zero-shot" and not (self.omitted and all(self.omitted)):
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


class TeacherRow(Strict):
    """One teacher of one seed: mll (as trained), control (fine-tuned with lambda = 0), mcmi."""

    seed: int
    teacher: Literal["mll", "control", "mcmi"]
    strength: float | None = Field(description="lambda of the fine-tuning; None for mll")
    train: dict[str, float | int | bool | None] = Field(description="Information over the training data")
    validation: dict[str, float | int | bool | None]
    test: dict[str, float | int | bool | None]
    temperatures: list[dict[str, float | None]] = Field(description="CMI over the training data at each temperature")
    stopped: str | None = None


class StudentRow(Strict):
    """One student. Accuracy is that after the last step; no epoch is chosen."""

    seed: int
    teacher: Literal["none", "mll", "control", "mcmi"]
    framework: str
    condition: str = Field(description="full, a share, or the classes left out")
    samples: int
    samples_per_class: int
    steps: int
    accuracy: float = Field(description="Over all test samples")
    omitted_recall: float | None = None
    kept_accuracy: float | None = None
    confusion: list[list[int]] | None = None


class PairedGain(Strict):
    """Accuracy (zero-shot: recall of the omitted classes) of students of the MCMI teacher minus that of another's."""

    framework: str
    condition: str
    against: Literal["mll", "control", "none"]
    mean: float
    standard_error: float | None = Field(description="Of the paired mean over seeds; None with one seed")
    wins: int
    seeds: int


class DistillReport(Strict):
    """`report.json` of `calib distill run`."""

    format: Literal["calib.distillation"] = "calib.distillation"
    version: Literal["1.0"] = "1.0"
    producer: Producer
    recipe: DistillRecipe
    versions: dict[str, str]
    data: dict[str, int | str]
    teachers: list[TeacherRow]
    students: list[StudentRow]
    gains: list[PairedGain]
    covered_area: dict[str, float] | None = Field(
        default=None, description="Eigen-CAM of the first seed's teachers: mean share of pixels above half the maximum"
    )
    warnings: list[str]
