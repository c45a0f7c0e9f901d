"""One module for each format that examples are read from."""
