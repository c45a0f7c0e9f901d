"""Tags of frames in compiled code, by OpenSSL's libcrypto; see `psgd_workers.transport.authentication`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.serving.compiled.native import call, compiled
from psgd_workers.transport.authentication import NONCE_SIZE, TAG_SIZE

__all__ = ["GmacArrays", "compute_tag", "count_frame", "is_tag", "is_used", "no_gmac"]

# Indices of `GmacArrays.handles`.
CONTEXT, INIT, UPDATE, FINAL, CONTROL, COMPARE = range(6)

NULL = 0
GET_TAG = np.int32(0x10)  # EVP_CTRL_AEAD_GET_TAG
LONGEST = 1 << 30  # bytes that one call adds; libcrypto counts them in an int
NUMBER_SIZE = 8  # bytes of a nonce that count


class GmacArrays(NamedTuple):
    """The arrays for the tags of frames in one direction of a connection."""

    handles: NDArray[np.int64]  # [6]: libcrypto's context, which has the key, and the addresses of its functions
    nonce: NDArray[np.uint8]  # [12]: number of the next frame, little-endian; Python's authenticator counts here, too
    tag: NDArray[np.uint8]  # [16], the tag that was computed last
    length: NDArray[np.int32]  # [1], written by libcrypto and not used


def no_gmac() -> GmacArrays:
    """Return arrays for a connection whose frames have no tags."""
    nonce = np.zeros(NONCE_SIZE, np.uint8)
    return GmacArrays(np.zeros(6, np.int64), nonce, np.zeros(TAG_SIZE, np.uint8), np.zeros(1, np.int32))


@compiled
def is_used(gmac: GmacArrays) -> bool:
    """Return True if frames have tags."""
    return bool(gmac.handles[CONTEXT] != NULL)


@compiled
def count_frame(gmac: GmacArrays) -> None:
    """Count the frame whose tag was computed: the next tag is that of the next frame."""
    gmac.nonce[:NUMBER_SIZE].view(np.uint64)[0] += np.uint64(1)


@compiled
def compute_tag(gmac: GmacArrays, header: NDArray[np.uint8], payload: NDArray[np.uint8]) -> bool:
    """Compute the tag of the next frame, without counting it. Return False if libcrypto fails."""
    handles = gmac.handles
    context = handles[CONTEXT]
    tag = gmac.tag.ctypes.data
    return bool(
        call(handles[INIT], (context, NULL, NULL, NULL, gmac.nonce.ctypes.data)) == 1
        and _add(gmac, header)
        and _add(gmac, payload)
        and call(handles[FINAL], (context, tag, gmac.length.ctypes.data)) == 1
        and call(handles[CONTROL], (context, GET_TAG, np.int32(TAG_SIZE), tag)) == 1
    )


@compiled
def is_tag(gmac: GmacArrays, tag: NDArray[np.uint8]) -> bool:
    """Return True if `tag`, 16 bytes, is the computed tag. The time does not depend on where they differ."""
    return bool(call(gmac.handles[COMPARE], (gmac.tag.ctypes.data, tag.ctypes.data, TAG_SIZE)) == 0)


@compiled
def _add(gmac: GmacArrays, data: NDArray[np.uint8]) -> bool:
    for start in range(0, len(data), LONGEST):
        piece = data[start : start + LONGEST]
        added = (gmac.handles[CONTEXT], NULL, gmac.length.ctypes.data, piece.ctypes.data, np.int32(len(piece)))
        if call(gmac.handles[UPDATE], added) != 1:
            return False
    return True
