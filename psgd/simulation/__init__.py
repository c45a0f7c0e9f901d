"""The production core on a virtual clock: `psgd simulate` and `psgd verify`."""
