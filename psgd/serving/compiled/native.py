"""Functions of the C library that compiled code calls, and the decorator that compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from psgd.serving.compiled.cache import SourceCacheLocator, own_cache

__all__ = ["call", "compiled", "error_location", "fence", "gettime", "lock", "recv", "send", "setaffinity", "unlock"]

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function when it is first called, and keep the code on disk if the user's cache can be written.

    The code does not hold the interpreter's lock. Floating-point operations stay as they are written, without
    `fastmath`, so that their bits are those of NumPy. A division by 0 gives inf or nan as in NumPy.
    """
    with own_cache():
        is_kept = SourceCacheLocator.from_function(function, function.__code__.co_filename) is not None
        return cast(Callable[P, R], njit(nogil=True, cache=is_kept, error_model="numpy")(function))


# Resolved by name when code is loaded, so that code on disk stays valid; a `ctypes` function would not be.
transfer = types.intp(types.int32, types.voidptr, types.uintp, types.int32)
recv: Any = types.ExternalFunction("recv", transfer)
send: Any = types.ExternalFunction("send", transfer)
lock: Any = types.ExternalFunction("pthread_mutex_lock", types.int32(types.voidptr))
unlock: Any = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.voidptr))
gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.voidptr))
setaffinity: Any = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.uintp, types.voidptr))
error_location: Any = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())


def _fence(_: Any) -> Any:
    """Keep the compiler and the processor from moving stores across this point."""

    def generate(context: Any, builder: Any, *_: Any) -> Any:
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), generate


fence: Any = intrinsic(_fence)


def _call(_: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at an address with a tuple of integers and pointers. Return its int."""

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        signature = ir.FunctionType(ir.IntType(32), [context.get_value_type(kind) for kind in arguments])
        function = builder.inttoptr(values[0], signature.as_pointer())
        return builder.call(function, cgutils.unpack_tuple(builder, values[1]))

    return types.int32(address, arguments), generate


call: Any = intrinsic(_call)
