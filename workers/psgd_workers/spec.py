"""What a job says about its model, its data and what workers push; `psgd.spec.JobSpec` composes these.

Specs are frozen and know no defaults from outside: what they say is all a run depends on.
"""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

__all__ = [
    "CompressionSpec",
    "CsvData",
    "DataSpec",
    "Fp16Compression",
    "Int8Compression",
    "LinearModel",
    "LocalSteps",
    "LossName",
    "MlpModel",
    "ModelSpec",
    "NoCompression",
    "NpzData",
    "PythonModel",
    "ScaledSignCompression",
    "SklearnData",
    "Spec",
    "TopKCompression",
    "TorchModel",
    "WorkerOptions",
]

LossName = Literal["cross_entropy", "mse", "binary_cross_entropy"]

FACTORY_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class Spec(BaseModel):
    """A frozen part of a job: unknown fields are refused, and so are infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With the text below each field as its description.

        pydantic's `use_attribute_docstrings` says the same, but reads the sources whenever a process starts.
        """
        made = handler(schema)
        properties = handler.resolve_ref_schema(made).get("properties", {})
        for name, text in _descriptions(cls).items():
            if name in properties:  # else it is a constant of the class
                properties[name]["description"] = text
        return made


def _descriptions(spec: type[Spec]) -> dict[str, str]:
    """The string after each field of a class and of those it is made from."""
    found = {}
    for each in reversed(spec.__mro__[: spec.__mro__.index(Spec)]):
        (definition,) = ast.parse(dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = inspect.cleandoc(said)
    return found


class LinearModel(Spec):
    """outputs = features · weightᵀ + bias: linear or (multinomial) logistic regression, by its loss."""

    kind: Literal["linear"]
    """Which model."""
    loss: LossName = "cross_entropy"
    """`cross_entropy` over classes (numbered from 0, or text), `binary_cross_entropy` over two classes (0 and 1, -1 and
    1, or two words), `mse` over numbers, whole ones included."""


class MlpModel(Spec):
    """A multi-layer perceptron; the input and output sizes are taken from the data."""

    kind: Literal["mlp"]
    """Which model."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(128,), min_length=1)
    """Units of each hidden layer, from input to output."""
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    """After each hidden layer. relu and gelu start from He's initialisation, tanh from Glorot's."""
    loss: LossName = "cross_entropy"
    """`cross_entropy` over classes (numbered from 0, or text), `binary_cross_entropy` over two classes (0 and 1, -1 and
    1, or two words), `mse` over numbers, whole ones included."""


class PythonModel(Spec):
    """A model of the user's own: an object that keeps `psgd_workers.models.Model`."""

    kind: Literal["python"]
    """Which model."""
    path: str = Field(pattern=FACTORY_PATTERN)
    """`package.module:factory`, importable on the workers; called with `kwargs`, it returns the model."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the factory: plain YAML values."""
    loss: ClassVar[None] = None  # the model has its own


class TorchModel(Spec):
    """A PyTorch `nn.Module`. Its parameters are the weights; its persistent buffers ride behind them (see README)."""

    kind: Literal["torch"]
    """Which model."""
    path: str = Field(pattern=FACTORY_PATTERN)
    """`package.module:factory`, importable on the workers; called with `kwargs`, it returns an `nn.Module`."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the factory: plain YAML values."""
    loss: LossName = "cross_entropy"
    """Mean loss of the module's outputs: `cross_entropy` of logits `[batch, classes]`, the others of `[batch, 1]`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a worker computes; `auto` takes a GPU if Ray gave the worker one."""


ModelSpec = Annotated[LinearModel | MlpModel | PythonModel | TorchModel, Field(discriminator="kind")]


class _Data(Spec):
    batch_size: int = Field(default=32, ge=1)
    """Examples per gradient. Larger: steadier gradients, fewer pushes."""
    drop_last: bool = False
    """True leaves out the last batch of each shard, in each epoch, if it is shorter than `batch_size`, as in a PyTorch
    `DataLoader`: for models that cannot compute a short batch, such as batch normalisation of one example. With
    `shuffle` each epoch leaves out other examples. Those of all other batches are trained on exactly once."""
    num_shards: int = Field(default=1, ge=1)
    """Pieces the training data is cut into, once, by the seed. 1: every epoch is one shuffle of everything, as in a
    PyTorch `DataLoader`. More: each shard is shuffled by itself, and a worker keeps to its own while it can."""
    shuffle: bool = True
    """Whether each epoch has an order of its own. False: the order of the file, every epoch."""
    normalize: Literal["none", "unit", "standardize"] = "none"
    """`unit`: (x - min) / (max - min), over all features of the training part. `standardize`: each feature to mean 0
    and deviation 1 over the training part."""
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the examples set aside, by the seed, to validate on; for data that has no validation part."""


class NpzData(_Data):
    """Arrays in a NumPy `.npz` file; the default keys are those of Keras' `mnist.npz`."""

    format: Literal["npz"]
    """Which format."""
    path: str = Field(min_length=1)
    """A path, or any URL that fsspec opens."""
    features: str = "x_train"
    """Key of the training features, `[examples, ...]`."""
    labels: str = "y_train"
    """Key of the training labels, `[examples]` or `[examples, targets]`."""
    validation_features: str | None = None
    """Key of the validation features. Default: `x_test` if the file has it and no `validation_fraction` is set."""
    validation_labels: str | None = None
    """Key of the validation labels. Default: `y_test`, as above."""

    @model_validator(mode="after")
    def _one_validation_part(self) -> NpzData:
        if (self.validation_features is None) != (self.validation_labels is None):
            raise ValueError("validation_features and validation_labels go together: give both or neither")
        if self.validation_features is not None and self.validation_fraction is not None:
            raise ValueError("give validation_features and validation_labels, or validation_fraction, not both")
        return self


class CsvData(_Data):
    """A table of numbers, one example a row; one column is the label."""

    format: Literal["csv"]
    """Which format."""
    path: str = Field(min_length=1)
    """A path, or any URL that fsspec opens."""
    label: str | int = -1
    """The label's column: its name in the header, or its number from 0 (negative: from the end)."""
    header: bool | None = None
    """True: the first row names the columns. False: it is an example. Default: it names them; a first row whose
    features are all numbers may be either, and is refused with a request to say which."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """What separates the columns."""

    @model_validator(mode="after")
    def _names_need_a_header(self) -> CsvData:
        if isinstance(self.label, str) and self.header is False:
            raise ValueError(f"label {self.label!r} names a column, but header is false: give the column's number")
        return self


class SklearnData(_Data):
    """One of the data sets that come inside scikit-learn."""

    format: Literal["sklearn"]
    """Which format."""
    dataset: Literal["breast_cancer", "diabetes", "digits", "iris", "wine"]
    """Which set."""


DataSpec = Annotated[NpzData | CsvData | SklearnData, Field(discriminator="format")]


class NoCompression(Spec):
    """Gradients travel as float32, 4 bytes a value."""

    name: Literal["none"] = "none"
    """Which compression."""


class Fp16Compression(Spec):
    """Half precision, 2 bytes a value; the mildest."""

    name: Literal["fp16"]
    """Which compression."""


class TopKCompression(Spec):
    """Only the values of largest magnitude travel, 8 bytes each."""

    name: Literal["top_k"]
    """Which compression."""
    ratio: float = Field(gt=0, le=1)
    """Share of each partition's values that travel in a push. Lower: fewer bytes, and the rest arrives later. Above
    0.5 it takes more bytes than no compression."""


class ScaledSignCompression(Spec):
    """The sign of each value and one magnitude for all of a partition, 1 bit a value."""

    name: Literal["scaled_sign"]
    """Which compression."""


class Int8Compression(Spec):
    """Multiples from -127 to 127 of a step, which each block of 1024 values has of its own; 1 byte a value."""

    name: Literal["int8"]
    """Which compression."""


CompressionSpec = Annotated[
    NoCompression | Fp16Compression | TopKCompression | ScaledSignCompression | Int8Compression,
    Field(discriminator="name"),
]


class LocalSteps(Spec):
    """A worker's own steps of plain SGD between a pull and a push."""

    steps: int = Field(ge=1)
    """Mini-batches in a push."""
    lr: float = Field(gt=0)
    """Their rate."""


class WorkerOptions(Spec):
    """What a job wants of its workers, beyond computing gradients: derived from the job by `psgd.spec`."""

    local: LocalSteps | None = None
    """Steps to take before each push; None: a push is a gradient."""
    compression: CompressionSpec = NoCompression()
    """How gradients travel."""
    sends_weights: bool = False
    """Whether a push brings the weights along that the gradient was computed from."""
    stop_at: int | None = Field(default=None, ge=1)
    """Staleness, in versions, at which a finished gradient is not pushed any more; None: it always is."""
