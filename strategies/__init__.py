"""One thing that changes memory or time per file; imported as ``pipefit.strategies``."""
