"""Layers, distributions and returns that the models share."""
