"""The core on a virtual clock: simulator, replay, verify."""
