"""Export of policies as graphs that run without worldloom, and without PyTorch."""
