"""Imports the user's own model factories from paths of the form `package.module:factory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

from psgd_workers.errors import ModelError
from psgd_workers.models.protocol import Model
from psgd_workers.spec import PythonModel

__all__ = ["build", "build_python_model", "load_factory"]

METHODS = ("initial_weights", "loss_and_gradient", "predict", "loss")


def load_factory(path: str) -> Callable[..., object]:
    """Return the callable at `package.module:factory`.

    Raises:
        ModelError: the module cannot be imported, or has no such callable.
    """
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # the user's module may raise any exception
        raise ModelError(
            f"cannot import module {module_name!r} of the model path {path!r}: {type(error).__name__}: {error}. "
            "The module and everything that it imports must be importable on every worker"
        ) from error
    factory = getattr(module, name, None)
    if factory is None:
        raise ModelError(f"module {module_name!r} has no {name!r}; check the model path {path!r}")
    if not callable(factory):
        raise ModelError(f"{path!r} is a {type(factory).__name__}; expected a function or class that returns the model")
    return cast("Callable[..., object]", factory)


def build(path: str, kwargs: Mapping[str, Any]) -> object:
    """Call the factory at `path` with `kwargs`, and return its result.

    Raises:
        ModelError: the factory cannot be found, or it raised an exception.
    """
    factory = load_factory(path)
    try:
        return factory(**kwargs)
    except Exception as error:  # the user's factory may raise any exception
        raise ModelError(
            f"the model factory {path!r} raised {type(error).__name__}: {error}. It was called with {dict(kwargs)}"
        ) from error


def build_python_model(spec: PythonModel) -> Model:
    """Build the user's own model, and check that it has the methods of `Model`.

    Raises:
        ModelError: the factory failed, or its result lacks a method.
    """
    model = build(spec.path, spec.kwargs)
    if missing := [name for name in METHODS if not callable(getattr(model, name, None))]:
        raise ModelError(
            f"{spec.path!r} returned a {type(model).__name__} without {', '.join(missing)}; "
            "expected an object with the four methods of psgd_workers.models.Model"
        )
    return cast("Model", model)
