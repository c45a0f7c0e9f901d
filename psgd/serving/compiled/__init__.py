"""The push path in compiled code: Numba functions over the arrays of a server, without the interpreter's lock.

A push of the usual case is applied here: it is admitted, its gradient is a step of its own, and its receipt follows at
once. Every other push is left to `ParameterServer.push`, with nothing changed. Both give the same bits.
"""
