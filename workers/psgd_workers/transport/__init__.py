"""Transport of gradients and weights between workers and servers: the lane port, its sockets and shared memory."""
