"""pipefit fits diffusion pipelines into the GPU you have."""

__version__ = "0.1.0"
