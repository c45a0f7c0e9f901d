from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from psgd_workers.gradients.compression import ErrorFeedback, TopK
from psgd_workers.gradients.sender import Sender, gradient_norm
from psgd_workers.messages import BatchId, Encoded, FloatArray, Gradient, Outcome, Version
from psgd_workers.spec import TopKCompression, WorkerOptions

SIZE = 10
TRAINABLE = 8
PARTS = [slice(0, 4), slice(4, 7), slice(7, 10)]  # the last has two buffers
READS = [Version(1, 3), Version(4, 2), Version(1, 9)]
COMPRESSED = WorkerOptions(compression=TopKCompression(name="top_k", ratio=0.25))
TAKEN = Outcome.APPLIED
REFUSED = Outcome.DUPLICATE


def randoms(seed: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)


def sent(sender: Sender, seed: int = 0, reads: Sequence[Version] = READS) -> list[Gradient]:
    return sender.gradients(BatchId(0, 0, seed), 16, reads, randoms(seed), -randoms(seed), 0.5, 2.0, 0.01)


def sender(worker_options: WorkerOptions, parts: Sequence[slice] = PARTS) -> Sender:
    return Sender("worker-0", 1, parts, TRAINABLE, worker_options)


@pytest.mark.parametrize("worker_options", [WorkerOptions(), WorkerOptions(sends_weights=True), COMPRESSED], ids=str)
@pytest.mark.parametrize("parts", [PARTS, [slice(0, SIZE)]], ids=["3 servers", "1 server"])
def test_the_pushes_of_a_slot_are_counted_from_one_alike_for_every_partition(
    worker_options: WorkerOptions, parts: Sequence[slice]
) -> None:
    mine = sender(worker_options, parts)
    for number in (1, 2, 3):
        pushes = sent(mine, number, READS[: len(parts)])
        assert {(push.worker, push.slot, push.number) for push in pushes} == {("worker-0", 1, number)}
        mine.settle([TAKEN] * (number % 2))


def test_each_partition_is_sent_its_slice_and_the_versions_of_the_others_in_their_order() -> None:
    pushes = sent(sender(WorkerOptions(sends_weights=True)))
    for partition, (push, part) in enumerate(zip(pushes, PARTS, strict=True)):
        assert isinstance(push.values, np.ndarray)
        np.testing.assert_array_equal(push.values, randoms(0)[part])
        np.testing.assert_array_equal(push.weights_read, -randoms(0)[part])
        assert push.read == READS[partition]
        assert push.others == tuple(READS[:partition] + READS[partition + 1 :])
    assert sent(sender(WorkerOptions(), [slice(0, SIZE)]), reads=READS[:1])[0].others == ()


def test_a_compressed_push_says_whose_remainder_it_carries_on_partition_by_partition() -> None:
    mine = sender(COMPRESSED)
    assert [push.carries for push in sent(mine, 1)] == [0, 0, 0]
    mine.settle([TAKEN, REFUSED])  # the third is in doubt
    assert [push.carries for push in sent(mine, 2)] == [1, 0, 0]
    mine.settle([REFUSED, Outcome.BUFFERED, TAKEN])
    assert [push.carries for push in sent(mine, 3)] == [1, 2, 2]
    mine.settle([])
    assert [push.carries for push in sent(mine, 4)] == [1, 2, 2]


def test_what_is_carried_on_is_what_that_push_left_out() -> None:
    mine = sender(COMPRESSED)
    memory = ErrorFeedback(TopK(0.25), 4)
    for number, outcome in enumerate([TAKEN, REFUSED, TAKEN, TAKEN]):
        values = sent(mine, number)[0].values
        expected = memory.encode(randoms(number)[:4])
        assert isinstance(values, Encoded)
        for found, wanted in zip(values.arrays, expected.arrays, strict=True):
            np.testing.assert_array_equal(found, wanted)
        mine.settle([outcome])
        (memory.taken if outcome is TAKEN else memory.refused)()
    assert mine.residual_norm == pytest.approx(memory.norm)


def test_nothing_is_carried_on_without_compression() -> None:
    mine = sender(WorkerOptions())
    for number in (1, 2):
        assert [push.carries for push in sent(mine, number)] == [0, 0, 0]
        mine.settle([TAKEN] * 3)
    assert mine.residual_norm == 0


def test_buffers_travel_as_they_are_beside_a_compressed_gradient() -> None:
    pushes = sent(sender(COMPRESSED))
    assert [push.buffers is None for push in pushes] == [True, True, False]
    np.testing.assert_array_equal(pushes[2].buffers, randoms(0)[8:])


def test_the_norm_is_of_the_trained_values_and_not_finite_if_a_buffer_is_not() -> None:
    values = randoms(0)
    assert gradient_norm(values, TRAINABLE) == pytest.approx(np.linalg.norm(values[:TRAINABLE]))
    values[-1] = np.inf
    assert np.isnan(gradient_norm(values, TRAINABLE))
