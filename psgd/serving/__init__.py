"""A server process without Ray: the host of a `ParameterServer`, and the connections of its workers."""
