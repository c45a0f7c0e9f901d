"""Runs on a real cluster. Only this package imports Ray."""
