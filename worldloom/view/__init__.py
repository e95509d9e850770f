"""The playback page: what a model sees, imagines, values and plans in evaluation episodes."""
