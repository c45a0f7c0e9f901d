"""The parts of a job that workers need: model, data, compression and local steps. `psgd.spec.JobSpec` composes them.

Specs are frozen and read no environment variables or other files, so that a run depends on nothing but its spec. They
are strict: text is never converted to a number, nor a boolean to a number or to text.
"""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise
from math import isfinite
from numbers import Integral
from textwrap import dedent
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

__all__ = [
    "CompressionSpec",
    "Count",
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
    "Whole",
    "WorkerOptions",
    "descriptions",
    "whole",
]

LossName = Literal["cross_entropy", "mse", "binary_cross_entropy"]

FACTORY_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


def whole(given: Any) -> Any:
    """Return a whole number such as 1e6, or an integer of NumPy, as an int. Return other values, also booleans,
    unchanged."""
    if isinstance(given, bool):
        return given
    is_whole = isinstance(given, Integral) or (isinstance(given, float) and given.is_integer())
    return int(given) if is_whole else given


Whole = Annotated[int, BeforeValidator(whole)]
"""A whole number in any notation: 1000, 1e3 or 1000.0."""
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]  # the bound must stand first to appear in the JSON schema
"""A whole number of 1 or more."""


def _check_factory(given: str) -> str:
    """Return the name of a function. Refuse a name that cannot be imported, with a suggestion."""
    if re.fullmatch(FACTORY_PATTERN, given) and ".py:" not in given:
        return given
    path = given.replace("/", ".").replace(".py:", ":").removesuffix("()").strip(".")
    if path.endswith(".py") or not re.search("[.:]", path):
        path = path.removesuffix(".py") + ":build"
    elif ":" not in path:
        path = ":".join(path.rsplit(".", 1))
    example = path if re.fullmatch(FACTORY_PATTERN, path) else "my_models:build"
    raise ValueError(f"expected 'package.module:factory'; for example {example}")


Factory = Annotated[str, AfterValidator(_check_factory), Field(json_schema_extra={"pattern": FACTORY_PATTERN})]
"""A function that can be imported, as `package.module:function`."""


def _check_plain(given: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that a job file cannot hold, because `resolved.json` could not hold them either."""
    waiting: list[Any] = [given]
    while waiting:
        match waiting.pop():
            case dict() as mapping:
                if wrong := [key for key in mapping if not isinstance(key, str)]:
                    raise ValueError(f"a key must be text: write {wrong[0]!r:.80} in quotes")
                waiting.extend(mapping.values())
            case list() | tuple() as items:
                waiting.extend(items)
            case float() as number if not isfinite(number):
                raise ValueError(f"{number} is not finite: leave it out, and let the function choose the value")
            case None | str() | int() | float():
                pass
            case other:
                raise ValueError(f"expected plain YAML values, not {type(other).__name__}")
    return given


Kwargs = Annotated[dict[str, Any], AfterValidator(_check_plain)]


class Spec(BaseModel):
    """A frozen part of a job. Unknown fields, infinities and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema, in which the string below each field is its description.

        pydantic's `use_attribute_docstrings` does the same, but reads the source files at each start of a process.
        """
        made = handler(schema)
        properties = handler.resolve_ref_schema(made).get("properties", {})
        for name, text in descriptions(cls).items():
            if name in properties:  # otherwise it is a constant of the class
                properties[name]["description"] = text
        return made


def descriptions(spec: type[Spec]) -> dict[str, str]:
    """Return the string below each field of a class and of its bases, by the name of the field."""
    found = {}
    for each in reversed(spec.__mro__[: spec.__mro__.index(Spec)]):
        (definition,) = ast.parse(dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        for field, following in pairwise(definition.body):
            match field, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found


class LinearModel(Spec):
    """A linear model: outputs = features · weightᵀ + bias. With the loss `mse` this is linear regression, with
    `cross_entropy` (multinomial) logistic regression."""

    kind: Literal["linear"]
    """The kind of model. The other fields of `model` depend on it."""
    loss: LossName = "cross_entropy"
    """The loss to minimise. `cross_entropy`: for classes (numbered 0, 1, 2, ..., or words). `binary_cross_entropy`: for
    two classes (0 and 1, -1 and 1, or two words). `mse`, the mean squared error: for numbers."""


class MlpModel(Spec):
    """A multi-layer perceptron, that is, fully connected layers. The data decides the sizes of its input and output."""

    kind: Literal["mlp"]
    """The kind of model. The other fields of `model` depend on it."""
    hidden: Annotated[tuple[Count, ...], Strict(False)] = Field(default=(128,), min_length=1, examples=[[256, 128]])
    """Number of units in each hidden layer, from input to output, such as `[256, 128]`."""
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    """Activation function after each hidden layer. The weights are initialised as by He et al. for relu and gelu, and
    as by Glorot and Bengio for tanh."""
    loss: LossName = "cross_entropy"
    """The loss to minimise. `cross_entropy`: for classes (numbered 0, 1, 2, ..., or words). `binary_cross_entropy`: for
    two classes (0 and 1, -1 and 1, or two words). `mse`, the mean squared error: for numbers."""


class PythonModel(Spec):
    """Your own model in Python, without PyTorch: an object with the methods of `psgd_workers.models.Model`."""

    kind: Literal["python"]
    """The kind of model. The other fields of `model` depend on it."""
    path: Factory
    """The function that returns the model, as `package.module:function`. Workers import it and call it with
    `kwargs`."""
    kwargs: Kwargs = {}
    """Keyword arguments for that function: plain YAML values."""
    loss: ClassVar[None] = None  # the model has its own


class TorchModel(Spec):
    """A PyTorch `nn.Module`. Its parameters are trained. Its persistent buffers, such as the running means of batch
    normalisation, are kept with the weights; each push adds the change that its batch made."""

    kind: Literal["torch"]
    """The kind of model. The other fields of `model` depend on it."""
    path: Factory
    """The function that returns the `nn.Module`, as `package.module:function`. Workers import it and call it with
    `kwargs`."""
    kwargs: Kwargs = {}
    """Keyword arguments for that function: plain YAML values."""
    loss: LossName = "cross_entropy"
    """The loss to minimise, a mean over the batch. The module must return logits of shape `[batch, classes]` for
    `cross_entropy`, logits `[batch, 1]` for `binary_cross_entropy`, and predictions `[batch, 1]` for `mse`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device that workers compute on. `auto`: a GPU if Ray reserved one for the worker, otherwise the CPU."""


ModelSpec = Annotated[LinearModel | MlpModel | PythonModel | TorchModel, Field(discriminator="kind")]


def _check_one_character(given: str) -> str:
    if len(given) != 1:
        raise ValueError('expected one character; a tab is written "\\t", in double quotes')
    return given


class _Data(Spec):
    batch_size: Count = 32
    """Number of examples from which a worker computes one gradient. Higher: steadier gradients, and fewer steps per
    epoch."""
    drop_last: bool = False
    """true: in each epoch the last batch of each shard is left out if it is shorter than `batch_size`, as by a PyTorch
    `DataLoader`. Use it for models that fail on a very short batch, such as batch normalisation on a single example.
    With `shuffle`, each epoch leaves out different examples. false: each epoch uses every example exactly once."""
    num_shards: Count = 1
    """Number of shards, the pieces that the training data is cut into; the seed decides the cut. 1: every epoch
    shuffles all examples together, as a PyTorch `DataLoader` does. More: every epoch shuffles each shard by itself, and
    a worker takes batches from the same shard as long as it has any."""
    shuffle: bool = True
    """true: the examples have another order in every epoch, which the seed decides. false: they have the order of the
    file."""
    normalize: Literal["none", "unit", "standardize"] = "none"
    """The scaling of the features. `unit`: (x - min) / (max - min), where min and max are taken over all features of
    all training examples. `standardize`: each feature gets mean 0 and standard deviation 1 over the training
    examples."""
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the examples that is used for validation instead of training, such as 0.2; the seed chooses the
    examples. Use it if the data has no validation examples. null: all examples are used for training."""


class NpzData(_Data):
    """Arrays in a NumPy `.npz` file. The default keys are those in `mnist.npz` of Keras."""

    format: Literal["npz"]
    """The format of the data. The other fields of `data` depend on it."""
    path: str = Field(min_length=1)
    """Path of the file, or any URL that fsspec opens, such as `s3://bucket/mnist.npz`."""
    features: str = "x_train"
    """Key of the training features, an array `[examples, ...]`."""
    labels: str = "y_train"
    """Key of the training labels, an array `[examples]` or `[examples, targets]`."""
    validation_features: str | None = None
    """Key of the validation features. null: `x_test`, if the file has it and `validation_fraction` is not set."""
    validation_labels: str | None = None
    """Key of the validation labels. null: `y_test`, if the file has it and `validation_fraction` is not set."""

    @model_validator(mode="after")
    def _one_validation_part(self) -> NpzData:
        if (self.validation_features is None) != (self.validation_labels is None):
            raise ValueError("validation_features and validation_labels belong together: give both or neither")
        if self.validation_features is not None and self.validation_fraction is not None:
            raise ValueError("give validation_features and validation_labels, or validation_fraction, not both")
        return self


class CsvData(_Data):
    """A table of numbers. Each row is an example, and one column is the label."""

    format: Literal["csv"]
    """The format of the data. The other fields of `data` depend on it."""
    path: str = Field(min_length=1)
    """Path of the file, or any URL that fsspec opens, such as `s3://bucket/table.csv`."""
    label: str | Whole = -1
    """The column that holds the label: its name in the first row, or its number. 0 is the first column, -1 the last."""
    header: bool | None = None
    """true: the first row holds the names of the columns. false: the first row is an example. null: the first row holds
    the names, unless all its features are numbers: then the job is refused, because the row could be an example."""
    delimiter: Annotated[str, AfterValidator(_check_one_character)] = Field(
        default=",", json_schema_extra={"minLength": 1, "maxLength": 1}
    )
    """The character between two columns. A tab is written `"\\t"`, in double quotes."""

    @model_validator(mode="after")
    def _names_need_a_header(self) -> CsvData:
        if isinstance(self.label, str) and self.header is False:
            raise ValueError(f"label {self.label!r} names a column, but header is false: give the column's number")
        return self


class SklearnData(_Data):
    """One of the data sets that are part of scikit-learn."""

    format: Literal["sklearn"]
    """The format of the data. The other fields of `data` depend on it."""
    dataset: Literal["breast_cancer", "diabetes", "digits", "iris", "wine"]
    """Name of the data set."""


DataSpec = Annotated[NpzData | CsvData | SklearnData, Field(discriminator="format")]


class NoCompression(Spec):
    """No compression: gradients are sent as float32, with 4 bytes per value."""

    name: Literal["none"] = "none"
    """The kind of compression."""


class Fp16Compression(Spec):
    """Half precision, with 2 bytes per value. This compression loses the least information."""

    name: Literal["fp16"]
    """The kind of compression."""


class TopKCompression(Spec):
    """Only the values of largest magnitude are sent, with 8 bytes each. The other values are added to the next
    gradient."""

    name: Literal["top_k"]
    """The kind of compression."""
    ratio: float = Field(gt=0, le=1)
    """Share of the values that are sent in a push. Lower: fewer bytes, and more values are sent later. Above 0.5, a
    push has more bytes than without compression."""


class ScaledSignCompression(Spec):
    """The sign of each value, with 1 bit per value, and one magnitude for all values that go to the same server. The
    rounding error is added to the next gradient."""

    name: Literal["scaled_sign"]
    """The kind of compression."""


class Int8Compression(Spec):
    """Integers from -127 to 127, with 1 byte per value, and one scale for each block of 1024 values. The rounding error
    is added to the next gradient."""

    name: Literal["int8"]
    """The kind of compression."""


CompressionSpec = Annotated[
    NoCompression | Fp16Compression | TopKCompression | ScaledSignCompression | Int8Compression,
    Field(discriminator="name"),
]


class LocalSteps(Spec):
    """Steps of plain SGD that a worker takes by itself between a pull and a push."""

    steps: Count
    """Number of steps, each on one mini-batch of the batch."""
    lr: float = Field(gt=0)
    """Learning rate of these steps."""


class WorkerOptions(Spec):
    """Options of a job's workers besides model and data. `JobSpec.worker_options` derives them from the job."""

    local: LocalSteps | None = None
    """Steps to take before each push. None: a push is a gradient."""
    compression: CompressionSpec = NoCompression()
    """Compression of the gradients."""
    sends_weights: bool = False
    """True: a push also carries the weights that the gradient was computed from."""
    stop_at: Count | None = None
    """Smallest staleness, in versions, at which a finished gradient is not pushed. None: every gradient is pushed."""
