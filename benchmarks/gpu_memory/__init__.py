"""Measures on an NVIDIA GPU what pipefit predicts, row by row, within a given number of minutes.

    python -m benchmarks.gpu_memory --minutes 8 --out DIR

Nothing is downloaded: catalogue pipelines are built at full size with random or zero weights. Every
row is written as soon as it is measured, so a run that is cut off goes on where it stopped. See
docs/measuring.md.
"""
