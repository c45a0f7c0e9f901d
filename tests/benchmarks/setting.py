"""The setting of every contender."""

__all__ = ["BATCH_SIZE", "LEARNING_RATE", "NUM_WORKERS", "SIZES"]

SIZES = (784, 256, 128, 10)  # units of each layer: 235,146 parameters; relu, and cross-entropy as the loss
BATCH_SIZE = 128
LEARNING_RATE = 0.05
NUM_WORKERS = 2
