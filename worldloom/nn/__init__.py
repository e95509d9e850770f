"""Layers, distributions and returns shared by the models."""
