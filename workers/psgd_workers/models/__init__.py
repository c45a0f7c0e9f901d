"""Models: NumPy layers and their backward passes, and adapters for the user's own."""

from __future__ import annotations

from math import prod

from psgd_workers.data.examples import Dataset
from psgd_workers.models.evaluation import evaluate
from psgd_workers.models.factory import build_python_model
from psgd_workers.models.labels import fit_labels, num_outputs
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.protocol import Model, ModelWithBuffers
from psgd_workers.spec import LinearModel, MlpModel, ModelSpec, PythonModel, TorchModel

__all__ = ["Model", "ModelWithBuffers", "build_model", "evaluate", "fit_labels"]


def build_model(spec: ModelSpec, dataset: Dataset) -> Model:
    """The model that `spec` describes, with inputs and outputs that fit the data.

    Args:
        spec: what to build.
        dataset: as `fit_labels` returned it.

    Raises:
        ModelError: the user's factory cannot be found, raised, or made something else than a model.
        MissingExtraError: the model needs PyTorch, which is not installed.
    """
    inputs = prod(dataset.train.features.shape[1:])
    match spec:
        case PythonModel():
            return build_python_model(spec)
        case TorchModel():
            # Imported here because importing torch takes seconds and it may not be installed.
            from psgd_workers.models.torch import TorchNetwork

            return TorchNetwork(spec)
        case LinearModel():
            return Network((inputs, num_outputs(spec.loss, dataset)), spec.loss)
        case MlpModel():
            return Network((inputs, *spec.hidden, num_outputs(spec.loss, dataset)), spec.loss, spec.activation)
