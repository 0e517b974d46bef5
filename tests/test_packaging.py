"""How the folders at the top become one package; each guard has caught a real mistake before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = {name: folder for name, folder in SETUPTOOLS["package-dir"].items() if name}


def test_every_package_is_listed() -> None:
    """A package that is not listed passes every other test and is missing from the wheel."""
    found = {"pipefit"} | {
        ".".join(("pipefit", *init.parent.relative_to(ROOT / "src/pipefit").parts))
        for init in (ROOT / "src/pipefit").glob("*/**/__init__.py")
        if not any(parent.is_symlink() for parent in init.parents)
    }
    for package, folder in MAPPED.items():
        found |= {
            ".".join((package, *init.parent.relative_to(ROOT / folder).parts))
            for init in (ROOT / folder).rglob("__init__.py")
        }
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


@pytest.mark.parametrize(("package", "folder"), MAPPED.items())
def test_links_agree_with_the_mapping(package, folder) -> None:
    link = ROOT / "src" / package.replace(".", "/")
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert link.resolve() == (ROOT / folder).resolve()


def test_no_file_is_imported_twice() -> None:
    """``import planner`` works by accident from the root; then every class exists twice."""
    seen: dict[Path, str] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and ROOT in (path := Path(file).resolve()).parents:
            if ".venv" in path.parts:
                continue
            assert path not in seen, f"{path} is imported as {seen[path]} and as {name}"
            seen[path] = name


def test_every_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    ]
    requirements = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    for requirement in requirements:
        [pin] = [
            pin
            for pin in pins
            if pin.name == requirement.name and (pin.marker is None or pin.marker.evaluate())
        ]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="))


def test_the_data_that_the_catalogue_reads_is_in_the_package() -> None:
    assert SETUPTOOLS["package-data"]["pipefit"] == ["py.typed", "catalog/**"]
    assert (ROOT / "src/pipefit/py.typed").exists()
