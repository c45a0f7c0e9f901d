"""How a gradient reaches a server: the lane port, sockets, shared memory and what they carry."""
