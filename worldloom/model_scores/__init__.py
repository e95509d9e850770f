"""Scores of a world model: how well it predicts what happened."""
