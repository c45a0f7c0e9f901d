from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd_workers.errors import ModelError
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=6)


def tensors_of(shapes: list[tuple[int, ...]]) -> dict[str, FloatArray]:
    """Return tensors t0, t1, ... whose values count 0, 1, 2, ... through all of them."""
    flat = np.arange(sum(map(prod, shapes)), dtype=np.float32)
    pieces = np.split(flat, np.cumsum([prod(shape) for shape in shapes])[:-1])
    return {f"t{i}": piece.reshape(shape) for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True))}


@given(shapes)
def test_packing_concatenates_the_tensors_in_their_order(shapes: list[tuple[int, ...]]) -> None:
    tensors = tensors_of(shapes)
    layout = Layout.of(tensors)
    flat = layout.pack(tensors)
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat, np.arange(layout.num_parameters))


@given(shapes, st.data())
def test_views_give_back_what_was_packed(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    tensors = tensors_of(shapes)
    buffers = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=len(tensors) - 1))
    layout = Layout.of(tensors, buffers)
    views = layout.views(layout.pack(tensors))
    assert set(views) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(views[name], tensor, strict=True)


def test_buffers_lie_behind_the_trained_parameters() -> None:
    tensors = {"mean": np.full(2, 8.0), "weight": np.ones((2, 3)), "count": np.array(9.0), "bias": np.zeros(2)}
    layout = Layout.of(tensors, buffers=("count", "mean"))
    assert layout.names == ("weight", "bias", "mean", "count")
    assert layout.shapes == ((2, 3), (2,), (2,), ())
    assert (layout.num_trainable, layout.num_parameters) == (8, 11)
    np.testing.assert_array_equal(layout.pack(tensors)[layout.num_trainable :], [8, 8, 9])


def test_writing_to_a_view_writes_to_the_vector() -> None:
    layout = Layout.of({"a": np.zeros(2), "b": np.zeros((2, 2))})
    flat = np.zeros(6)
    layout.views(flat)["b"][1, 0] = 5
    np.testing.assert_array_equal(flat, [0, 0, 0, 0, 5, 0])


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \(4,\) does not fit this layout, which has 3 values"):
        Layout.of({"a": np.zeros(3)}).views(np.zeros(4))


def test_a_buffer_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match=r"buffers \['c'\] are not among its weights \['a', 'b'\]"):
        Layout.of({"a": np.zeros(3), "b": np.zeros(1)}, buffers=("b", "c"))


@pytest.mark.parametrize("tensors", [{}, {"mean": np.zeros(3)}])
def test_a_model_without_trainable_parameters_is_refused(tensors: dict[str, FloatArray]) -> None:
    with pytest.raises(ModelError, match="no trainable parameters"):
        Layout.of(tensors, buffers=tuple(tensors))
