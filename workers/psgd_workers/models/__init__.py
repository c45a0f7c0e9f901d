"""Models in NumPy, and adapters for the user's own models."""

from __future__ import annotations

from math import prod

from psgd_workers.data.examples import Dataset
from psgd_workers.models.evaluation import evaluate
from psgd_workers.models.factory import build_python_model
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.protocol import Model, ModelWithBuffers
from psgd_workers.spec import LinearModel, LossName, MlpModel, ModelSpec, PythonModel, TorchModel

__all__ = ["Model", "ModelWithBuffers", "build_model", "evaluate"]


def build_model(spec: ModelSpec, dataset: Dataset) -> Model:
    """Build the model that `spec` describes, with inputs and outputs that fit the data.

    Args:
        spec: `model` section of the job.
        dataset: data set, with labels encoded for the loss of the model.

    Returns:
        The model.

    Raises:
        ModelError: the user's factory cannot be found, raised an exception, or returned an object that is not a model.
        MissingExtraError: the model needs PyTorch, which is not installed.
    """
    inputs = prod(dataset.train.features.shape[1:])
    match spec:
        case PythonModel():
            return build_python_model(spec)
        case TorchModel():
            # Imported here because importing torch takes seconds, and torch may not be installed.
            from psgd_workers.models.torch import TorchNetwork

            return TorchNetwork(spec, dataset.train.features.shape[1:])
        case LinearModel():
            return Network((inputs, _num_outputs(spec.loss, dataset)), spec.loss)
        case MlpModel():
            return Network((inputs, *spec.hidden, _num_outputs(spec.loss, dataset)), spec.loss, spec.activation)


def _num_outputs(loss: LossName, dataset: Dataset) -> int:
    if loss == "cross_entropy":
        assert dataset.classes is not None, "the labels were encoded for another loss"
        return len(dataset.classes)
    return 1 if loss == "binary_cross_entropy" else dataset.train.labels.shape[1]
