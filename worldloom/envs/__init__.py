"""Environments: spaces, vectors of environments, worker processes and wrappers."""
