"""The algorithm: pure. No Ray, no clock, no disk, no sockets, no threads."""
