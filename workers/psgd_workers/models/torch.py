"""A PyTorch `nn.Module` as a `Model`. Imported only by jobs that ask for it, and the only importer of torch."""

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
    """The module that the factory makes, fed with weights from outside.

    Its tensors are the module's parameters and persistent buffers, by the names of its `state_dict`. Integer buffers
    travel as float32, exact up to 2²⁴. A frozen parameter counts as a buffer: no optimizer may decay it. Lazy modules
    get their sizes from one pass over zeros.

    Args:
        spec: what to build.
        example_shape: of the features of one example.

    Attributes:
        buffers: the tensors that change, if at all, without a gradient.

    Raises:
        ModelError: the factory does not make an `nn.Module`, some of its parameters have no values, or the device is
            not there.
    """

    def __init__(self, spec: TorchModel, example_shape: tuple[int, ...]) -> None:
        self._spec = spec
        self._example_shape = example_shape
        self._device = _device(spec.device)
        # A constant seed: what the factory draws and the weights do not hold is then the same on every worker.
        self._module = self._build(seed=0).to(self._device)
        persistent = self._module.state_dict().keys()
        buffers = [name for name, _ in self._module.named_buffers() if name in persistent]
        self._names = [*dict(self._module.named_parameters()), *buffers]
        self.buffers: Collection[str] = frozenset(
            name for name, tensor in self._tensors(self._module).items() if not tensor.requires_grad
        )

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:
        """The tensors of a new module, which the factory fills from torch's generator, seeded with `seed`."""
        return {name: _array(tensor) for name, tensor in self._tensors(self._build(seed)).items()}

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        """Backpropagate one batch, in training mode; see `Model.loss_and_gradient`."""
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
        self._load(weights)
        self._module.eval()
        with torch.no_grad():
            return _array(self._outputs(features))

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        return LOSSES[self._spec.loss](outputs, labels, gradient=np.empty_like(outputs))

    def _build(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        module = build(self._spec.path, self._spec.kwargs)
        if not isinstance(module, torch.nn.Module):
            raise ModelError(f"{self._spec.path!r} made a {type(module).__name__}; expected a torch.nn.Module")
        if _without_values(module):
            self._initialise(module)
        return module

    def _initialise(self, module: torch.nn.Module) -> None:
        """Let lazy modules see the shape of their inputs."""
        fault: str | None = None
        module.eval()
        try:
            with torch.no_grad():
                module(torch.zeros(2, *self._example_shape))
        except Exception as error:  # noqa: BLE001 - a module of the user's may raise anything
            fault = f"a pass over zeros of shape {[2, *self._example_shape]} raised {type(error).__name__}: {error}"
        if missing := _without_values(module):
            raise ModelError(
                f"the module of {self._spec.path!r} has parameters without values: {', '.join(missing)}; "
                f"{fault or 'a pass over zeros left them as they were'}. Give their layers all sizes, or use them in "
                "forward(), and build them on the CPU"
            )

    def _tensors(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        # Asked anew each time: a module may assign a new tensor to a buffer instead of writing into the old one.
        tensors = dict(chain[tuple[str, torch.Tensor]](module.named_parameters(), module.named_buffers()))
        return {name: tensors[name] for name in self._names}

    def _load(self, weights: Mapping[str, FloatArray]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors(self._module).items():
                values = _tensor(weights[name])
                tensor.copy_(values if tensor.is_floating_point() else values.round())

    def _outputs(self, features: FloatArray) -> torch.Tensor:
        """Return `[batch, num_outputs]`; a module that returns `[batch]` has one output."""
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
            raise ModelError(f"the module's outputs are {list(outputs.shape)}; expected {list(targets.shape)}")
        if self._spec.loss == "mse":
            return torch.nn.functional.mse_loss(outputs, targets)
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)


def _without_values(module: torch.nn.Module) -> list[str]:
    """Name the tensors that lazy modules have not made yet, and those on the meta device."""
    tensors = chain[tuple[str, torch.Tensor]](module.named_parameters(), module.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor) or tensor.is_meta]


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ModelError("the model asks for device 'cuda', but this worker sees no GPU: give it one, or use 'auto'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    # torch warns of read-only memory, which is what Ray hands out for arrays in its object store.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(tensor: torch.Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float32).numpy()
    return array
