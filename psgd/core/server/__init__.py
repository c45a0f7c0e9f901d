"""One server: its partition of the weights, and every part that a push passes on its way into them."""
