from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from psgd_workers.errors import ModelError
from psgd_workers.models.factory import METHODS, build, build_python_model, load_factory
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.protocol import Model
from psgd_workers.spec import PythonModel


def python_model(name: str, **kwargs: object) -> PythonModel:
    return PythonModel(kind="python", path=f"users_own.models:{name}", kwargs=kwargs)


def test_a_factory_is_found_by_its_path() -> None:
    assert load_factory("psgd_workers.models.numpy.network:Network") is Network


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ModelError, match=r"cannot import module 'no_such_module' of .*No module named"):
        load_factory("no_such_module:make")


def test_a_module_that_raises_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="ZeroDivisionError: division by zero"):
        load_factory("raises_on_import:make")


def test_a_missing_attribute_is_named() -> None:
    with pytest.raises(ModelError, match=r"'psgd_workers\.models\.numpy\.network' has no 'Missing'"):
        load_factory("psgd_workers.models.numpy.network:Missing")


def test_a_factory_must_be_callable() -> None:
    with pytest.raises(ModelError, match="is a tuple; expected a function or class"):
        load_factory("psgd_workers.models.factory:METHODS")


def test_a_factory_gets_its_kwargs(users_module: ModuleType) -> None:
    users_module.make = dict  # type: ignore[attr-defined]
    assert build("users_own.models:make", {"width": 3}) == {"width": 3}


def test_a_factory_that_raises_is_a_model_error_with_its_arguments(users_module: ModuleType) -> None:
    users_module.make = lambda width: width  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"raised TypeError: .*unexpected keyword.* called with \{'depth': 2\}"):
        build("users_own.models:make", {"depth": 2})


def test_a_python_model_with_the_four_methods_is_taken(users_module: ModuleType) -> None:
    users_module.make = lambda width: Network((width, 1), "mse")  # type: ignore[attr-defined]
    model = build_python_model(python_model("make", width=2))
    assert model.predict(model.initial_weights(0), np.ones((5, 2), np.float32)).shape == (5, 1)


def test_the_methods_a_python_model_lacks_are_named(users_module: ModuleType) -> None:
    class Half:
        loss = 0.5

        def initial_weights(self, seed: int) -> dict[str, object]:
            return {}

    users_module.Half = Half  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="returned a Half without loss_and_gradient, predict, loss; expected"):
        build_python_model(python_model("Half"))


def test_the_methods_asked_for_are_those_of_the_protocol() -> None:
    assert set(METHODS) == {name for name in vars(Model) if not name.startswith("_")}
