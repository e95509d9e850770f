"""Shared by the commands: from the command line to a task, a model, data and a run folder."""
