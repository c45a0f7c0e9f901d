"""One partition of the weights, and the way of a push through it, hook by hook."""
