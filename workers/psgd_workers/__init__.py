"""The code that runs on a worker machine: messages, data, models, the worker. Imports neither psgd nor ray."""
