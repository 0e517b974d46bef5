"""Tests neither read nor fill the user's trace cache; they share one of their own per session."""

from __future__ import annotations

import os
import tempfile

# Set before any test module is imported, so that worker processes of one session share it.
os.environ.setdefault("PIPEFIT_CACHE", tempfile.mkdtemp(prefix="pipefit-test-cache-"))
