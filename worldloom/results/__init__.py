"""Results of many runs: reading their folders, statistics over seeds, tables, curves and figures.

Nothing here imports torch, Hydra or Lightning, so that a table appears within a second.
"""
