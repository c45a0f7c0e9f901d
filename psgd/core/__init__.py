"""The algorithm, as pure code: it uses no Ray, clock, disk, socket or thread. `driver` imports `server`."""
