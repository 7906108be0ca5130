import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tvkd_fast

ROOT = Path(__file__).parents[1]
PINNED_EXTRAS = ("", "demo", "plot", "dev")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split_lines = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonical(name): version for name, version in split_lines}


def requirements() -> list[Requirement]:
    """Return the requirements of the installed package and of the extras that the Makefile installs."""
    parsed = [Requirement(line) for line in metadata.requires("tvkd_fast") or []]
    return [r for r in parsed if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in PINNED_EXTRAS)]


def test_version_is_stated_once() -> None:
    assert metadata.version("tvkd_fast") == tvkd_fast.__version__


def test_types_are_offered() -> None:
    assert resources.files("tvkd_fast").joinpath("py.typed").is_file()


def test_the_command_is_registered() -> None:
    (command,) = (point for point in metadata.entry_points(group="console_scripts") if point.name == "tvkd")
    assert command.value == "tvkd_fast.cli.main:main"


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_a_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    pin = pins().get(canonical(requirement.name))
    assert pin is not None, f"add {requirement.name} to constraints.txt"
    assert requirement.specifier.contains(pin)


def test_constraints_are_sorted_and_say_no_local_build() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert list(pins()) == sorted(pins())


def test_measured_results_are_no_part_of_an_sdist() -> None:
    taken = [line.split()[1:] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if "recursive" in line]
    assert not [folder for folder, *patterns in taken if folder in ("bench", "docs") and "*.json" in patterns]
    assert not list((ROOT / "docs").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tree", "sdist"])
def test_the_wheel_holds_kernels_recipes_and_types(tmp_path: Path, source: str) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    if source == "sdist":
        tree = unpacked_sdist(tree, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(tree)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())

    sources = {f"tvkd_fast/{file.relative_to(ROOT / 'tvkd_fast')}" for file in (ROOT / "tvkd_fast").rglob("*.py")}
    kernels = {f"tvkd_fast/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").glob("*.py")}
    recipes = {f"tvkd_fast/{file.relative_to(ROOT / 'tvkd_fast')}" for file in ROOT.glob("tvkd_fast/recipes/**/*.yaml")}
    assert sources | kernels | recipes | {"tvkd_fast/py.typed"} <= held
    assert {name.split("/")[0] for name in held} == {"tvkd_fast", f"tvkd_fast-{tvkd_fast.__version__}.dist-info"}


def copy_of_the_tree(target: Path) -> Path:
    """Copy the files that packaging reads, without the output of earlier builds."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target / name)
    for name in ("tvkd_fast", "kernels"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def unpacked_sdist(tree: Path, tmp_path: Path) -> Path:
    build = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    return unpacked
