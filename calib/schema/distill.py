# SPDX-License-Identifier: Apache-2.0
"""Files of distillation: the recipe that `calib distill run` reads, and the classifiers that it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from calib.schema.provenance import Producer, Strict
from calib.schema.recipe import RecipeMetadata

__all__ = [
    "DataRecipe",
    "Deployment",
    "DistillRecipe",
    "DistillReport",
    "EncoderFile",
    "FakeQuantizationRecipe",
    "FrameworkRecipe",
    "ImageInput",
    "Latency",
    "McmiRecipe",
    "ModelRecipe",
    "NetworkFile",
    "OptimiserRecipe",
    "PairedGain",
    "PeakRecipe",
    "ProtocolRecipe",
    "QuantizationRecipe",
    "QuantizedAccuracy",
    "SitePeak",
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
    image: ImageInput | None = Field(default=None, description="None: it reads texts, its tokenizer lies beside it")
    vocabulary: int | None = Field(default=None, ge=1, description="Tokens of a network for texts")
    max_length: int | None = Field(default=None, ge=1, description="Most tokens of a text")

    @model_validator(mode="after")
    def _reads_something(self) -> NetworkFile:
        if (self.image is None) != (self.vocabulary is not None and self.max_length is not None):
            raise ValueError("either image, or vocabulary and max_length are needed")
        return self


class EncoderFile(Strict):
    """`classifier.json` beside a text encoder as transformers saves it and `head.safetensors`."""

    format: Literal["calib.encoder-classifier"] = "calib.encoder-classifier"
    version: Literal["1.0"] = "1.0"
    classes: int = Field(ge=2)
    class_names: list[str]
    max_length: int = Field(ge=1, description="Tokens of a text")


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
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of products in the forward pass; weights stay in float32"
    )


class DataRecipe(Strict):
    """Where samples come from. Validation data are split off the training data, stratified.

    For a language model the source is text as `calib measure --data` takes it, cut into blocks of `max_length` tokens;
    `limit` is the number of all blocks (128 if absent), and as many as validate also test.
    """

    source: str = Field(description="hub:OWNER/NAME, folder or file; see `calib distill cmi --help`")
    train_split: str = "train"
    test_split: str = "test"
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1, description="At most so many training samples, stratified")
    image: ImageInput = Field(default_factory=ImageInput)
    max_length: int = Field(default=128, ge=1, description="Tokens of a text")


class ModelRecipe(Strict):
    """Where a model comes from: exactly one of network, encoder and model."""

    network: str | None = Field(default=None, description="Built-in network with fresh weights, trained here")
    encoder: str | None = Field(default=None, description="Text encoder that gets a fresh head, trained here")
    layers: int | None = Field(default=None, ge=1, description="Of an encoder or a language model, keep so many")
    model: str | None = Field(default=None, description="Hub id or folder of a trained classifier or language model")
    fresh: dict[str, bool | int | float | str] | None = Field(
        default=None,
        description="Fresh weights for the encoder or model: its configuration with these changes, trained here",
    )
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if sum(source is not None for source in (self.network, self.encoder, self.model)) != 1:
            raise ValueError("exactly one of network, encoder and model is needed")
        if self.layers is not None and self.network is not None:
            raise ValueError("layers belongs to an encoder or a language model")
        if self.fresh is not None and self.network is not None:
            raise ValueError("fresh belongs to an encoder or a model; the weights of a network are fresh anyway")
        if self.fresh is not None and self.layers is not None:
            raise ValueError("layers keeps trained layers; with fresh weights set fresh: {num_hidden_layers: ...}")
        return self

    @property
    def trained_here(self) -> bool:
        """Whether it has weights that know nothing yet."""
        return self.model is None or self.fresh is not None


class TeacherRecipe(ModelRecipe):
    """A model trained here by log-likelihood where its weights are fresh, or a checkpoint taken as it is."""


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
    row_memory: int = Field(default=1000, ge=1, description="MB for the centroids of a language model")

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

    @property
    def weights(self) -> dict[str, float | None]:
        """r, a, b and T by name; None where the framework's own is meant."""
        return self.model_dump(include={"cross_entropy", "soft_targets", "feature", "temperature"})


class FakeQuantizationRecipe(Strict):
    """The forward pass in training as the deployment computes it."""

    weight_bits: int | None = Field(default=8, ge=2, le=8)
    activation_bits: int | None = Field(default=8, ge=2, le=8)
    step: Literal["lsq", "pact", "absmax"] = Field(default="lsq", description="Of activations")
    weight_step: Literal["absmax", "lsq"] = Field(default="absmax", description="Of each output row of a weight")
    start: float = Field(default=0.0, ge=0, lt=1, description="Share of the training that is in float first")


class PeakRecipe(Strict):
    """A term against values that stand out."""

    term: Literal["peak_to_mean", "peak", "kurtosis", "l4", "range"] = "peak_to_mean"
    share: float = Field(default=0.03, gt=0, lt=1, description="Of the loss; its weight follows from it")
    sites: list[str] = Field(default=[], description="Patterns; by default see PeakControl")


class QuantizationRecipe(Strict):
    """Students trained for quantization, each beside the same student trained without, then deployed."""

    fake: FakeQuantizationRecipe | None = Field(default_factory=FakeQuantizationRecipe)
    peaks: PeakRecipe | None = Field(default_factory=PeakRecipe)
    plain: bool = Field(default=True, description="Also train and deploy each student without either")
    calibration: int = Field(default=512, ge=1, description="Training samples to choose scales from")

    @model_validator(mode="after")
    def _does_something(self) -> QuantizationRecipe:
        if self.fake is None and self.peaks is None:
            raise ValueError("fake or peaks is needed; leave quantization out for plain students")
        if self.fake is not None and self.fake.weight_bits is None and self.fake.activation_bits is None:
            raise ValueError("fake: weight_bits or activation_bits is needed")
        return self


class StudentRecipe(ModelRecipe):
    """A model to start from and the frameworks to train it by; `ce`, no teacher, is always among them."""

    frameworks: list[FrameworkRecipe] = Field(min_length=1)
    quantization: QuantizationRecipe | None = None


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
    task: Literal["image-classification", "text-classification", "audio-classification", "text-generation"]
    data: DataRecipe
    teacher: TeacherRecipe
    mcmi: McmiRecipe = Field(default_factory=McmiRecipe)
    student: StudentRecipe
    protocol: ProtocolRecipe = Field(default_factory=ProtocolRecipe)
    temperatures: list[float] = Field(default=[1.0], min_length=1, description="CMI of the teachers at each")
    seeds: list[int] = Field(default=[0], min_length=1)
    tensorboard: bool = Field(
        default=False, description="Write the losses for TensorBoard too; log.csv has them anyway"
    )

    @model_validator(mode="after")
    def _language_models_are_given(self) -> DistillRecipe:
        if self.task == "text-generation":
            if self.teacher.model is None or self.student.model is None:
                raise ValueError("text-generation: teacher and student each need a model; layers makes one smaller")
            if self.protocol.kind == "zero-shot" or self.mcmi.refresh == "ema":
                raise ValueError("text-generation: tokens cannot be left out, nor drawn in balance; choose another")
        elif self.teacher.model is not None and self.teacher.layers is not None:
            raise ValueError("teacher: layers belongs to an encoder or a language model")
        elif self.student.model is not None and self.student.layers is not None:
            raise ValueError("student: layers belongs to an encoder or a language model")
        return self


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


class SitePeak(Strict):
    """How far the largest value of a site stands out."""

    site: str
    kind: str
    amax: float
    peak_over_rms: float


class QuantizedAccuracy(Strict):
    """Accuracy over the test data with fake-quantized weights and static activations."""

    weight_bits: int | None = Field(description="One scale per output row; None: float")
    activation_bits: int | None = Field(description="One scale per tensor; None: float")
    scales: Literal["measured", "learned"] = Field(
        description="measured: by absmax, as `calib quantize` chooses them; learned: the steps of the training"
    )
    accuracy: float


class Latency(Strict):
    """Time of one input in ONNX Runtime, one thread: medians of alternating runs.

    Measured once a seed with a teacher and once without: the graphs of its students differ in their numbers only.
    """

    teacher_ms: float | None = Field(default=None, description="Of the teacher, in float; None without a teacher")
    float_ms: float
    int8_ms: float
    speedup: float = Field(description="Median of the ratios of neighbouring runs")
    integer_layers: int = Field(description="Layers that the INT8 graph multiplies in integers")
    layers: int = Field(
        description="Linear layers and convolutions that are judged in INT8; some stay in float in the graph"
    )


class Deployment(Strict):
    """One student measured, quantized and judged."""

    peaks: list[SitePeak] = Field(description="The worst sites by max|A| / rms(A), over calibration samples")
    mean_peak: float = Field(description="max|A| / rms(A), mean over all measured sites")
    accuracy: float = Field(description="In float")
    quantized: list[QuantizedAccuracy]
    left_in_float: dict[str, str] = Field(description="Tensors that are not quantized, and why")
    float_bytes: int
    bytes_by_weight_bits: dict[str, int]
    latency: Latency | None = None
    no_latency: str | None = Field(default=None, description="Why it was not measured")


class StudentRow(Strict):
    """One student. Accuracy is that after the last step; no epoch is chosen."""

    seed: int
    teacher: Literal["none", "mll", "control", "mcmi"]
    framework: str
    variant: Literal["plain", "friendly"] = Field(
        default="plain", description="friendly: trained for quantization; plain: the same without"
    )
    condition: str = Field(description="full, a share, or the classes left out")
    samples: int
    samples_per_class: int
    steps: int
    accuracy: float = Field(description="Over all test samples; of next tokens for a language model")
    log_likelihood: float | None = Field(default=None, description="Of next tokens of the test data, mean, in nats")
    omitted_recall: float | None = None
    kept_accuracy: float | None = None
    confusion: list[list[int]] | None = None
    deployment: Deployment | None = None


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
    class_names: list[str] = Field(default=[], description="In the order of the confusion matrices")
    teachers: list[TeacherRow]
    students: list[StudentRow]
    gains: list[PairedGain]
    covered_area: dict[str, float] | None = Field(
        default=None, description="Eigen-CAM of the first seed's teachers: mean share of pixels above half the maximum"
    )
    warnings: list[str]
