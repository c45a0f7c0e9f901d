"""Adapts a PyTorch `nn.Module` to the `Model` interface. No other module imports torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from psgd_workers.errors import MissingExtraError, ModelError
from psgd_workers.messages import FloatArray
from psgd_workers.models.factory import build
from psgd_workers.models.numpy.losses import LOSSES
from psgd_workers.spec import TorchModel

try:
    import torch
    from torch.nn.parameter import is_lazy
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "a model of kind 'torch' needs PyTorch, which is not installed: pip install 'psgd[torch]'"
    ) from error

__all__ = ["TorchNetwork"]


class TorchNetwork:
    """A model that copies the weights it is given into the user's `nn.Module`, and calls the module.

    The tensors are the module's parameters and persistent buffers, with the names of its `state_dict`. Integer buffers
    become float32, which is exact up to 2²⁴. A frozen parameter counts as a buffer, so that no optimizer decays it.
    Lazy layers get their sizes from a forward pass over zeros.

    Args:
        spec: `model` section of the job.
        example_shape: shape of the features of one example.

    Attributes:
        buffers: names of the tensors that have no gradient.

    Raises:
        ModelError: the factory failed or did not return an `nn.Module`, a parameter has no values, or the device is not
            available.
    """

    def __init__(self, spec: TorchModel, example_shape: tuple[int, ...]) -> None:
        self._spec = spec
        self._example_shape = example_shape
        self._device = _device(spec.device)
        # A constant seed, so that random values outside the weights are the same on every worker.
        self._module = self._build(seed=0).to(self._device)
        persistent = self._module.state_dict().keys()
        buffers = [name for name, _ in self._module.named_buffers() if name in persistent]
        self._names = [*dict(self._module.named_parameters()), *buffers]
        self.buffers: Collection[str] = frozenset(
            name for name, tensor in self._tensors(self._module).items() if not tensor.requires_grad
        )

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:
        """Return the tensors of a new module, built with torch's random generator seeded with `seed`."""
        return {name: _array(tensor) for name, tensor in self._tensors(self._build(seed)).items()}

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        """Backpropagate one batch in training mode. See `Model.loss_and_gradient`."""
        self._load(weights)
        self._module.train()
        self._module.zero_grad()
        torch.manual_seed(seed)
        loss = self._loss(self._outputs(features), _tensor(labels).to(self._device))
        torch.autograd.backward(loss)
        for name, tensor in self._tensors(self._module).items():
            if name in self.buffers:
                np.subtract(weights[name], _array(tensor), out=gradient[name])
            elif tensor.grad is None:
                gradient[name].fill(0)
            else:
                torch.from_numpy(gradient[name]).copy_(tensor.grad)
        return loss.item()

    def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
        """Return the outputs in evaluation mode. See `Model.predict`."""
        self._load(weights)
        self._module.eval()
        with torch.no_grad():
            return _array(self._outputs(features))

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        """Return the mean loss of outputs. See `Model.loss`."""
        return LOSSES[self._spec.loss](outputs, labels, gradient=np.empty_like(outputs))

    def _build(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        module = build(self._spec.path, self._spec.kwargs)
        if not isinstance(module, torch.nn.Module):
            raise ModelError(f"{self._spec.path!r} returned a {type(module).__name__}; expected a torch.nn.Module")
        if _without_values(module):
            self._initialise(module)
        return module

    def _initialise(self, module: torch.nn.Module) -> None:
        """Run a forward pass over zeros, which gives lazy layers their sizes."""
        fault: str | None = None
        module.eval()
        try:
            with torch.no_grad():
                module(torch.zeros(2, *self._example_shape))
        except Exception as error:  # noqa: BLE001 - the user's module may raise any exception
            shape = [2, *self._example_shape]
            fault = f"a forward pass over zeros of shape {shape} raised {type(error).__name__}: {error}"
        if missing := _without_values(module):
            raise ModelError(
                f"the module of {self._spec.path!r} has parameters without values: {', '.join(missing)}; "
                f"{fault or 'a forward pass over zeros gave them none'}. Build their layers on the CPU, and give each "
                "layer its sizes or use it in forward()"
            )

    def _tensors(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        # Looked up in each call: a module may replace the tensor of a buffer instead of writing into it.
        tensors = dict(chain[tuple[str, torch.Tensor]](module.named_parameters(), module.named_buffers()))
        return {name: tensors[name] for name in self._names}

    def _load(self, weights: Mapping[str, FloatArray]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors(self._module).items():
                values = _tensor(weights[name])
                tensor.copy_(values if tensor.is_floating_point() else values.round())

    def _outputs(self, features: FloatArray) -> torch.Tensor:
        """Return the outputs `[batch, num_outputs]`. Outputs `[batch]` become one column."""
        outputs = self._module(_tensor(features).to(self._device))
        if not isinstance(outputs, torch.Tensor):
            raise ModelError(
                f"the module of {self._spec.path!r} returned a {type(outputs).__name__}; expected a tensor "
                "[batch, outputs]"
            )
        return outputs.reshape(-1, 1) if outputs.ndim < 2 else outputs

    def _loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._spec.loss == "cross_entropy":
            return torch.nn.functional.cross_entropy(outputs, labels)
        targets = labels.to(outputs.dtype).reshape(len(labels), -1)
        if outputs.shape != targets.shape:
            raise ModelError(
                f"the module's outputs have shape {list(outputs.shape)}; expected {list(targets.shape)}, "
                "the shape of the labels"
            )
        if self._spec.loss == "mse":
            return torch.nn.functional.mse_loss(outputs, targets)
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)


def _without_values(module: torch.nn.Module) -> list[str]:
    """Return the names of tensors that lazy layers have not created yet, and of tensors on the meta device."""
    tensors = chain[tuple[str, torch.Tensor]](module.named_parameters(), module.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor) or tensor.is_meta]


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ModelError(
            "the model asks for device 'cuda', but this worker has no GPU: give it one, or set model.device to 'auto'"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    # Copied because torch warns about read-only memory; arrays from Ray's object store are read-only.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(tensor: torch.Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float32).numpy()
    return array
