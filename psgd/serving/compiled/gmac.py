"""Tags of frames in compiled code, by OpenSSL's libcrypto; see `psgd_workers.transport.authentication`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.serving.compiled.native import call, compiled
from psgd_workers.transport.authentication import NONCE_SIZE, TAG_SIZE

__all__ = ["GmacArrays", "add_bytes", "begin_tag", "count_frame", "end_tag", "is_tag", "is_used", "no_gmac"]

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
def begin_tag(gmac: GmacArrays) -> bool:
    """Begin the tag of the next frame, without counting the frame. Return False if libcrypto fails."""
    return bool(call(gmac.handles[INIT], (gmac.handles[CONTEXT], NULL, NULL, NULL, gmac.nonce.ctypes.data)) == 1)


@compiled
def add_bytes(gmac: GmacArrays, data: NDArray[np.uint8]) -> bool:
    """Add bytes of the frame to its tag. Return False if libcrypto fails."""
    for start in range(0, len(data), LONGEST):
        piece = data[start : start + LONGEST]
        added = (gmac.handles[CONTEXT], NULL, gmac.length.ctypes.data, piece.ctypes.data, np.int32(len(piece)))
        if call(gmac.handles[UPDATE], added) != 1:
            return False
    return True


@compiled
def end_tag(gmac: GmacArrays) -> bool:
    """Write the tag of the bytes into `gmac.tag`. Return False if libcrypto fails."""
    context = gmac.handles[CONTEXT]
    tag = gmac.tag.ctypes.data
    return bool(
        call(gmac.handles[FINAL], (context, tag, gmac.length.ctypes.data)) == 1
        and call(gmac.handles[CONTROL], (context, GET_TAG, np.int32(TAG_SIZE), tag)) == 1
    )


@compiled
def is_tag(gmac: GmacArrays, tag: NDArray[np.uint8]) -> bool:
    """Return True if `tag`, 16 bytes, is the computed tag. The time does not depend on where they differ."""
    return bool(call(gmac.handles[COMPARE], (gmac.tag.ctypes.data, tag.ctypes.data, TAG_SIZE)) == 0)
