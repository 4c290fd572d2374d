"""The package list, the linked folders and the package data agree with the tree."""

import fnmatch
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tfmq_fx

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LINKED = ("passes", "backends")
LOOSE = ("pyproject.toml", "README.md", "LICENSE")


def test_the_package_list_is_the_tree():
    places = {"tfmq_fx": ROOT / "tfmq_fx"} | {f"tfmq_fx.{n}": ROOT / n for n in LINKED}
    found = set()
    for package, place in places.items():
        for init in place.rglob("__init__.py"):  # links are not followed
            inner = init.parent.relative_to(place).parts
            if not (package == "tfmq_fx" and inner and inner[0] in LINKED):
                found.add(".".join((package, *inner)))
    assert found == set(SETUPTOOLS["packages"])
    # setuptools finds folders inside these by itself
    assert {p: ROOT / folder for p, folder in SETUPTOOLS["package-dir"].items()} == places


@pytest.mark.parametrize("name", LINKED)
def test_the_folders_are_linked_into_the_package(name):
    link = ROOT / "tfmq_fx" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name and (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", LINKED)
def test_they_cannot_be_imported_twice(name):
    command = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    message = f"ImportError: import this package as tfmq_fx.{name}, not as {name}"
    assert done.returncode != 0 and message in done.stderr


def test_package_data_is_listed_and_present():
    data = SETUPTOOLS["package-data"]
    root, package = ROOT / "tfmq_fx", ROOT / "tfmq_fx" / "evaluation"
    assert data["tfmq_fx"] == ["py.typed"] and (root / "py.typed").is_file()
    patterns = data["tfmq_fx.evaluation"]
    files = [
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    for name in ("digits-unet", "glyphs-dit", "glyphs-unet"):
        assert any(f.startswith(f"assets/{name}/") for f in files)
    assert [f for f in files if not any(fnmatch.fnmatch(f, p) for p in patterns)] == []
    for pattern in patterns:
        assert fnmatch.filter(files, pattern), pattern
    others = [
        path
        for path in root.rglob("*")  # links are not followed
        if path.is_file() and path.suffix not in (".py", ".pyc") and package not in path.parents
    ]
    assert others == [root / "py.typed"]


def test_sources_of_kernels_are_package_data():
    found = {}
    for path in (ROOT / "backends").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            inner = path.parent.relative_to(ROOT / "backends").parts
            found.setdefault(".".join(("tfmq_fx.backends", *inner)), []).append(path.name)
    names = ["kernels.cpp", "attention.h", "avx512.h", "conv.h", "norm.h", "plain.h", "vectors.h"]
    assert {package: sorted(each) for package, each in found.items()} == {
        "tfmq_fx.backends.cpu": sorted(names)
    }
    for package, names in found.items():
        patterns = SETUPTOOLS["package-data"][package]
        assert all(any(fnmatch.fnmatch(name, p) for p in patterns) for name in names)


def test_building_says_nothing_and_takes_all_data(tmp_path):
    found = [path for folder in ("tfmq_fx", *LINKED) for path in (ROOT / folder).rglob("*")]
    files = [p.relative_to(ROOT) for p in found if p.is_symlink() or p.is_file()]
    files = [file for file in files if "__pycache__" not in file.parts]
    for file in (*files, *map(Path, LOOSE)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            (tmp_path / file).touch()  # megabytes, and only the names matter
        else:
            shutil.copy(ROOT / file, tmp_path / file, follow_symlinks=False)
    build = "import sys; from setuptools import build_meta as b; print(b.build_wheel('out'))"
    command = [sys.executable, "-W", "error::UserWarning", "-c", build]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "absent from the" not in done.stderr, done.stderr
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {
        f"tfmq_fx/{file}" if file.parts[0] in LINKED else str(file)
        for file in files
        if not (ROOT / file).is_symlink()
    }


def test_the_version_is_one():
    assert PROJECT["project"]["version"] == tfmq_fx.__version__


def test_the_command_exists():
    module, function = PROJECT["project"]["scripts"]["tfmq-fx"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_every_module_has_its_place_in_the_layers():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = [c for c in contracts if c["type"] == "layers" and c["containers"] == ["tfmq_fx"]]
    named = {
        n for line in layers["layers"] for n in line.replace("|", ":").replace(" ", "").split(":")
    }
    package = ROOT / "tfmq_fx"
    modules = {p.stem for p in package.glob("*.py")} - {"__init__"}
    folders = {p.parent.name for p in package.glob("*/__init__.py")}
    assert modules | folders == named


def test_what_is_imported_is_declared():
    declared = " ".join(PROJECT["project"]["dependencies"])
    for name in ("torch", "torchao", "numpy", "scipy", "networkx", "safetensors", "tqdm"):
        assert f"{name}>=" in declared, name
