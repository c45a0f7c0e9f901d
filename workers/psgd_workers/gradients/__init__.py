"""Gradients as flat vectors: their layout, their slices by partition, and their compression."""
