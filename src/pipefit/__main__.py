"""``python -m pipefit`` is the ``pipefit`` command."""

from __future__ import annotations

import sys

from pipefit.planner.cli import main

if __name__ == "__main__":
    sys.exit(main())
