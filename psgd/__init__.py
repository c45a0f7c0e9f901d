"""Parameter-server SGD on Ray."""
