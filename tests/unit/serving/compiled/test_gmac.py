from __future__ import annotations

import _hashlib
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd_workers.transport.authentication import TAG_SIZE, FrameAuthenticator
from tests.support.server_harness import IS_COMPILED

if not IS_COMPILED:
    pytest.skip("the push path is not compiled", allow_module_level=True)

from psgd.serving.compiled import libcrypto as module  # needs Numba
from psgd.serving.compiled.gmac import GmacArrays, add_bytes, begin_tag, count_frame, end_tag, is_tag, is_used, no_gmac
from psgd.serving.compiled.libcrypto import Libcrypto

KEY = bytes(range(32))


def found() -> Libcrypto:
    libcrypto = Libcrypto.find()
    assert libcrypto is not None
    return libcrypto


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8)


def tag(gmac: GmacArrays, header: bytes, payload: bytes) -> bytes:
    assert begin_tag(gmac)
    assert add_bytes(gmac, array(header))
    assert add_bytes(gmac, array(payload))
    assert end_tag(gmac)
    return gmac.tag.tobytes()


@pytest.mark.parametrize(
    ("key", "nonce", "data", "expected"),
    [
        # McGrew and Viega, "The Galois/Counter Mode of Operation (GCM)", 2004, test case 13.
        ("00" * 32, "00" * 12, "", "530f8afbc74536b9a963b4f1c4cb738b"),
        # NIST's validation vectors, gcmEncryptExtIV256: IV of 96 bits, no plaintext, additional data of 128 bits.
        (
            "78dc4e0aaf52d935c3c01eea57428f00ca1fd475f5da86a49c8dd73d68c8e223",
            "d79cf22d504cc793c3fb6c8a",
            "b96baa8c1c75a671bfb2d08d06be5f36",
            "3e5d486aa2e30b22e040b85723a06e76",
        ),
    ],
)
def test_a_tag_is_that_of_a_published_vector(key: str, nonce: str, data: str, expected: str) -> None:
    authenticator = FrameAuthenticator(bytes.fromhex(key))
    authenticator.nonce[:] = array(bytes.fromhex(nonce))
    gmac = found().gmac(authenticator)
    assert tag(gmac, bytes.fromhex(data), b"").hex() == expected
    assert tag(gmac, bytes.fromhex(data)[:3], bytes.fromhex(data)[3:]).hex() == expected, "it is not counted"


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=6), st.integers(0, 2**64 - 8))
def test_tags_are_those_of_python_whoever_counts_the_frames(frames: list[tuple[bytes, bytes]], number: int) -> None:
    first = FrameAuthenticator(KEY)
    first.nonce[:8].view("<u8")[0] = number
    gmac = found().gmac(first)
    other = FrameAuthenticator(KEY)
    other.nonce[:] = first.nonce
    for turn, (header, payload) in enumerate(frames):
        if turn % 3 == 2:
            ours = first.tag((header, payload))
        else:
            ours = tag(gmac, header, payload)
            count_frame(gmac)
        assert ours == other.tag((header, payload))
    assert first.nonce.tobytes() == other.nonce.tobytes()


@given(st.integers(0, 8 * TAG_SIZE - 1))
def test_a_tag_with_one_other_bit_is_another_tag(bit: int) -> None:
    gmac = found().gmac(FrameAuthenticator(KEY))
    right = array(tag(gmac, b"header", b"payload"))
    assert is_tag(gmac, right)
    right[bit // 8] ^= 1 << bit % 8
    assert not is_tag(gmac, right)


def test_only_a_connection_with_tags_uses_libcrypto() -> None:
    assert is_used(found().gmac(FrameAuthenticator(KEY)))
    assert not is_used(no_gmac())


@pytest.mark.parametrize(("name", "result"), [("_new", 0), ("_begin", 0)])
def test_a_context_that_cannot_be_made_is_an_error_and_leaves_no_memory(name: str, result: int) -> None:
    libcrypto: Any = found()
    made: list[int] = []
    freed: list[int] = []
    new = libcrypto._new

    def noted() -> int:
        made.append(new())
        return made[-1]

    libcrypto._new = noted
    libcrypto._free = freed.append
    setattr(libcrypto, name, lambda *arguments: result)
    with pytest.raises(MemoryError, match="libcrypto cannot"):
        libcrypto.gmac(FrameAuthenticator(KEY))
    gc.collect()
    assert freed == made


def test_a_library_without_aes_gcm_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_hashlib, "__file__", str(tmp_path / "absent.so"))
    assert Libcrypto.find() is not None, "the system's library is taken"
    monkeypatch.setattr(module, "find_library", lambda name: "libc.so.6")
    assert Libcrypto.find() is None


def test_a_python_without_openssl_takes_the_systems_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_hashlib", None)
    assert Libcrypto.find() is not None
    monkeypatch.setattr(module, "find_library", lambda name: "libc.so.6")
    assert Libcrypto.find() is None


@pytest.mark.parametrize("faulty", ["gmac", "end_tag"])
def test_a_library_that_fails_or_computes_other_tags_is_not_taken(monkeypatch: pytest.MonkeyPatch, faulty: str) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("libcrypto cannot")

    if faulty == "gmac":
        monkeypatch.setattr(Libcrypto, "gmac", fail)
    else:
        monkeypatch.setattr(module, "end_tag", lambda gmac: True)  # the tag stays zeros
    assert Libcrypto.find() is None
