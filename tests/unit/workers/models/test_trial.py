from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from psgd_workers.data.examples import Dataset, Examples
from psgd_workers.errors import ModelError
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.protocol import Model
from psgd_workers.models.torch import TorchNetwork
from psgd_workers.models.trial import ModelTrial, draw_weights
from psgd_workers.spec import LossName, TorchModel

ROWS = np.arange(8)
CLASSES = ("a", "b", "c")

Trained = Mapping[str, FloatArray]


def dataset(loss: LossName | None = "cross_entropy", classes: tuple[str, ...] | None = CLASSES) -> Dataset:
    rng = np.random.default_rng(0)
    labels: NDArray[Any] = np.arange(30) % (2 if loss == "binary_cross_entropy" else 3)
    if loss == "mse":
        labels = rng.normal(size=(30, 2)).astype(np.float32)
        classes = None
    examples = Examples(rng.normal(size=(30, 6)).astype(np.float32), labels)
    return Dataset(examples[:20], examples[20:], classes, fingerprint="")


def try_out(
    model: Model,
    data: Dataset,
    loss: LossName | None = "cross_entropy",
    smallest: int = 8,
) -> None:
    weights = draw_weights(model, 0)
    layout = Layout.of(weights, getattr(model, "buffers", ()))
    ModelTrial(model, layout, layout.pack(weights), data, loss).run(ROWS, ROWS[:smallest])


class Own(Network):
    """A correct model of the user's own. Subclasses add one fault each."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__((6, outputs), "cross_entropy")


@pytest.fixture
def torch_model(users_module: Any) -> Callable[..., TorchNetwork]:
    def make(factory: Callable[[], object], loss: LossName = "cross_entropy") -> TorchNetwork:
        users_module.make = factory
        spec = TorchModel(kind="torch", path="users_own.models:make", loss=loss, device="cpu")
        return TorchNetwork(spec, (6,))

    return make


# Models that pass


@pytest.mark.parametrize(("loss", "outputs"), [("cross_entropy", 3), ("mse", 2), ("binary_cross_entropy", 1)])
def test_a_model_that_fits_passes_and_its_data_and_weights_stay_as_they_are(loss: LossName, outputs: int) -> None:
    data = dataset(loss)
    before = dataset(loss)
    model = Network((6, outputs), loss)
    try_out(model, data, loss, smallest=1)
    assert data.validation is not None
    assert before.validation is not None
    np.testing.assert_array_equal(data.train.features, before.train.features)
    np.testing.assert_array_equal(data.validation.features, before.validation.features)


def test_more_outputs_than_classes_are_no_mistake(torch_model: Callable[..., TorchNetwork]) -> None:
    try_out(torch_model(lambda: nn.Linear(6, 10)), dataset())
    try_out(Own(10), dataset(), loss=None)


def test_a_model_that_diverges_at_once_is_for_the_run_to_judge() -> None:
    class Diverging(Own):
        def loss_and_gradient(
            self, weights: Trained, features: FloatArray, labels: NDArray[Any], gradient: Trained, seed: int
        ) -> float:
            for tensor in gradient.values():
                tensor[...] = np.nan
            return float("inf")

    try_out(Diverging(), dataset())


# Models that change their inputs in place


class InPlace(Own):
    """A model that changes its inputs, outputs and labels in place."""

    def loss_and_gradient(
        self, weights: Trained, features: FloatArray, labels: NDArray[Any], gradient: Trained, seed: int
    ) -> float:
        features /= 255
        return super().loss_and_gradient(weights, features, labels, gradient, seed)

    def predict(self, weights: Trained, features: FloatArray) -> FloatArray:
        features /= 255
        return super().predict(weights, features)

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        outputs -= outputs.max()
        value = super().loss(outputs, labels)
        labels *= 0
        return value


class InPlaceModule(nn.Sequential):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(values.div_(255))  # type: ignore[no-untyped-call]
        return outputs


def test_a_model_may_change_its_inputs_in_place_and_the_data_stays(torch_model: Callable[..., TorchNetwork]) -> None:
    module = torch_model(lambda: InPlaceModule(nn.Linear(6, 3)))
    for model in (InPlace(), module):
        data = dataset()
        before = dataset()
        try_out(model, data, smallest=1)
        assert data.validation is not None
        assert before.validation is not None
        for part, expected in ((data.train, before.train), (data.validation, before.validation)):
            np.testing.assert_array_equal(part.features, expected.features)
            np.testing.assert_array_equal(part.labels, expected.labels)


# Models that are refused


def check(model: Model, message: str, data: Dataset | None = None, loss: LossName | None = None, **sizes: int) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        try_out(model, data or dataset(), loss, **sizes)


def test_weights_that_a_model_changes_are_named() -> None:
    class Decaying(Own):
        def loss_and_gradient(
            self, weights: Trained, features: FloatArray, labels: NDArray[Any], gradient: Trained, seed: int
        ) -> float:
            weights["layers.0.weight"][...] *= np.float32(0.9)
            return super().loss_and_gradient(weights, features, labels, gradient, seed)

    check(Decaying(), "changed the weights 'layers.0.weight' that it was given: copy them first")


class Forgetful(Own):
    """A model that does not write all of its bias' gradient, in one of the ways in which users forget it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def loss_and_gradient(
        self, weights: Trained, features: FloatArray, labels: NDArray[Any], gradient: Any, seed: int
    ) -> float:
        written = {name: np.empty_like(tensor) for name, tensor in gradient.items()}
        loss = super().loss_and_gradient(weights, features, labels, written, seed)
        gradient["layers.0.weight"][...] = written["layers.0.weight"]
        match self.way:
            case "replaced":
                gradient["layers.0.bias"] = written["layers.0.bias"]
            case "added":
                gradient["layers.0.bias"] += written["layers.0.bias"]
            case "in part":
                gradient["layers.0.bias"][:2] = written["layers.0.bias"][:2]
        return loss


@pytest.mark.parametrize(("way", "number"), [("forgotten", 0), ("replaced", 0), ("added", 0), ("in part", 2)])
def test_a_gradient_that_is_not_written_is_named(way: str, number: int) -> None:
    message = f"wrote {number} of the 3 values of gradient 'layers.0.bias': write every value into the given array"
    check(Forgetful(way), message)


@pytest.mark.parametrize(
    ("loss", "outputs", "expected"),
    [
        ("cross_entropy", 2, "their shape is [8, 2], expected [8, 3], a logit for each class (a, b, c)"),
        ("cross_entropy", 1, "their shape is [8, 1], expected [8, 3]"),
        ("mse", 1, "their shape is [8, 1], expected [8, 2], a value for each target"),
        ("mse", 3, "their shape is [8, 3], expected [8, 2]"),
        ("binary_cross_entropy", 2, "their shape is [8, 2], expected [8, 1], the logit of the second class"),
    ],
)
def test_outputs_are_compared_with_the_labels(
    torch_model: Callable[..., TorchNetwork], loss: LossName, outputs: int, expected: str
) -> None:
    data = dataset(loss, CLASSES[:2] if loss == "binary_cross_entropy" else CLASSES)
    module = torch_model(lambda: nn.Linear(6, outputs), loss)
    check(module, f"the model's outputs do not fit the labels: for 8 examples {expected}", data, loss)


def test_outputs_of_a_model_with_its_own_loss_are_compared_too() -> None:
    check(Own(2), "their shape is [8, 2], expected [8, 3], a logit for each class (a, b, c)")
    data = dataset("binary_cross_entropy", ("0", "1"))
    try_out(Network((6, 1), "binary_cross_entropy"), data, loss=None)  # a single logit, whose sign is the class

    class Flat(Own):
        def predict(self, weights: Trained, features: FloatArray) -> FloatArray:
            flat: FloatArray = super().predict(weights, features)[:, 0]
            return flat

    check(Flat(), "their shape is [8], expected [8, 3]")


def test_outputs_that_are_no_tensor_are_named(torch_model: Callable[..., TorchNetwork]) -> None:
    class Several(nn.Linear):
        def forward(self, values: torch.Tensor) -> Any:
            return super().forward(values), values

    model = torch_model(lambda: Several(6, 3))
    check(model, "the module of 'users_own.models:make' returned a tuple; expected a tensor [batch, outputs]")


def test_inputs_of_another_size_are_told_with_their_shape(torch_model: Callable[..., TorchNetwork]) -> None:
    message = "the model failed to predict the first batch (8 examples of shape [6]): RuntimeError"
    check(torch_model(lambda: nn.Linear(7, 3)), message)


def test_a_loss_that_is_no_number_is_refused() -> None:
    class Silent(Own):
        def loss_and_gradient(self, *args: Any, **kwargs: Any) -> Any:
            super().loss_and_gradient(*args, **kwargs)

    check(Silent(), "failed to train on the first batch (8 examples): TypeError: float() argument must be")


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))


def test_a_model_that_cannot_compute_the_smallest_batch_is_refused(torch_model: Callable[..., TorchNetwork]) -> None:
    try_out(torch_model(normalised), dataset(), smallest=2)
    message = (
        "the model failed to train on the smallest batch (1 example, the last batch of a shard): "
        "ValueError: Expected more than 1 value per channel"
    )
    check(torch_model(normalised), message, loss="cross_entropy", smallest=1)
    with pytest.raises(ModelError, match=r"Leave it out by `data\.drop_last: true`, or choose another batch_size"):
        try_out(torch_model(normalised), dataset(), smallest=1)


def test_what_fails_in_validation_alone_is_found() -> None:
    class Unjudging(Own):
        def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
            raise NotImplementedError("later")

    check(Unjudging(), "the model failed to evaluate 10 examples of the validation part: NotImplementedError: later")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "initial_weights returned a NoneType; expected a dict of named arrays"),
        ([np.zeros(3)], "initial_weights returned a list; expected a dict of named arrays"),
        ({"w": None}, "initial_weights returned 'w' with dtype object; expected a string as the name"),
        ({"w": np.zeros(3, np.complex64)}, "initial_weights returned 'w' with dtype complex64"),
        ({0: np.zeros(3)}, "initial_weights returned 0 with dtype float64; expected a string"),
        ({"w": nn.Parameter(torch.zeros(3))}, "initial_weights(0) raised RuntimeError: Can't call numpy() on Tensor"),
        ({"w": np.array([0, np.nan])}, "initial weights 'w' have values that are not finite in float32: initialise"),
        ({"w": np.array([1e300])}, "initial weights 'w' have values that are not finite in float32"),
    ],
)
def test_initial_weights_that_are_no_weights_are_refused(weights: Any, message: str) -> None:
    class Given(Own):
        def initial_weights(self, seed: int) -> Any:
            return weights

    with pytest.raises(ModelError, match=re.escape(message)):
        draw_weights(Given(), 0)


def test_initial_weights_that_raise_are_a_model_error() -> None:
    class Raising(Own):
        def initial_weights(self, seed: int) -> Any:
            raise KeyError("seed")

    with pytest.raises(ModelError, match=r"the model's initial_weights\(7\) raised KeyError: 'seed'"):
        draw_weights(Raising(), 7)


def test_a_constant_that_is_infinite_is_no_weight(torch_model: Callable[..., TorchNetwork]) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.register_buffer("mask", torch.full((3,), -torch.inf))

    with pytest.raises(ModelError, match=r"'mask' have values that are not finite .*persistent=False"):
        draw_weights(torch_model(Masked), 0)
