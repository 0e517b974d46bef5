"""The way in and the way through; imported as ``pipefit.planner``."""
