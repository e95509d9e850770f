"""Adapters of simulators, one module per suite; each has a function `make_env`."""
