"""A gradient as a flat vector: its layout, its cutting by partition, its compression."""
