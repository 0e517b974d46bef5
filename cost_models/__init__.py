"""Pure prediction of memory and time, without torch; imported as ``pipefit.cost_models``."""
