"""What ``import pipefit`` offers: exactly what is listed, all of it working, none of it early."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import pipefit
from pipefit import errors


def test_the_list_of_public_names_is_sorted_and_complete() -> None:
    raised = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.PipefitError)
    }
    functions = {"apply", "auto_optimize", "load", "plan", "predict", "probe"}
    assert pipefit.__all__ == sorted(raised | functions)
    assert set(dir(pipefit)) >= set(pipefit.__all__)


@pytest.mark.parametrize("name", pipefit.__all__)
def test_every_public_name_works_and_is_documented(name) -> None:
    value = getattr(pipefit, name)
    assert callable(value)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_a_name_that_is_not_public_is_missing() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = pipefit.optimise


@pytest.mark.parametrize(
    "program",
    [
        "import pipefit; pipefit.NoPlanFits",
        "from pipefit.planner.cli import main; main(['--help'])",
        "from pipefit.planner.cli import main; main(['catalog', '--json'])",
        "from pipefit.planner.cli import main; main(['plan', 'x', '--gpu=rtx-4060', '--vram=0'])",
        "from pipefit.planner.plan import Plan; from pipefit.planner.report import plan_report",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(program) -> None:
    check = (
        "; import sys; sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
