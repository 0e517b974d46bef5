"""The arrows between the rooms: planner → strategies → cost_models, and a core without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cost_models", "strategies", "planner")
"""Lowest first: a room may import itself and the rooms before it."""

PURE = [
    *sorted(f"cost_models.{file.stem}" for file in (ROOT / "cost_models").glob("[!_]*.py")),
    "planner.plan",
    "planner.policy",
    "planner.search",
]


def imported(file: Path) -> set[str]:
    """Names of the modules that *file* imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_rooms_point_one_way(room) -> None:
    above = ROOMS[ROOMS.index(room) + 1 :]
    wrong = [
        (file.name, name)
        for file in (ROOT / room).glob("*.py")
        for name in imported(file)
        if name.startswith(tuple(f"pipefit.{other}." for other in above))
    ]
    assert not wrong


def test_the_rooms_use_nothing_of_the_public_face_but_errors_and_version() -> None:
    rooms = tuple(f"pipefit.{room}" for room in ROOMS)
    face = {
        name
        for room in ROOMS
        for file in (ROOT / room).glob("*.py")
        for name in imported(file)
        if name.split(".")[0] == "pipefit" and not name.startswith(rooms)
    }
    assert {name for name in face if not name.startswith("pipefit.errors.")} <= {
        "pipefit.__version__"
    }


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_names_no_framework(module) -> None:
    file = ROOT / (module.replace(".", "/") + ".py")
    frameworks = {"torch", "diffusers", "transformers", "accelerate"}
    assert not {name.split(".")[0] for name in imported(file)} & frameworks


def test_the_pure_core_imports_with_the_frameworks_blocked() -> None:
    program = (
        "import sys, importlib\n"
        "for name in ('torch', 'diffusers', 'transformers', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {PURE!r}:\n"
        "    importlib.import_module('pipefit.' + name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
