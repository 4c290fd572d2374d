"""The kernels' library: compiled once, found again, and loaded where nobody else can have written
it."""

import os
import subprocess
import sys

import pytest

from tfmq_fx.backends.cpu import library
from tfmq_fx.backends.cpu.library import NATIVE, load
from tfmq_fx.core.errors import BackendError


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(monkeypatch, path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(library, "_compiler", lambda: str(path))


COPIES = """
[ "$1" = --version ] && echo 1.0 && exit
for last; do :; done
echo "no library" > "$last"
"""


def test_a_compiler_that_fails_is_heard(cache, monkeypatch, tmp_path):
    compiler(monkeypatch, tmp_path / "cc", 'echo "unknown option -march" >&2; exit 1')
    with pytest.raises(
        BackendError, match=r"kernels\.cpp does not compile:\nunknown option -march"
    ):
        load(NATIVE, "some")
    assert [*cache.iterdir()] == []


def test_a_machine_without_a_compiler_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(library, "_compiler", lambda: "no-such-compiler")
    with pytest.raises(BackendError, match=r"none runs here \(FileNotFoundError: .*Install g\+\+"):
        load(NATIVE, "some")


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    compiler(monkeypatch, tmp_path / "cc", COPIES)
    (tmp_path / "file").write_text("")
    for named in (tmp_path / "file", tmp_path / "file" / "deeper"):
        monkeypatch.setenv("TFMQ_FX_CACHE", str(named))
        with pytest.raises(BackendError, match=r"cannot be kept in .*Set TFMQ_FX_CACHE"):
            load(NATIVE, "some")

    def full(*args, **kwargs):
        raise OSError("read-only file system")

    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "folder_beside", full)
    with pytest.raises(BackendError, match=r"cannot be kept in .*: read-only file system"):
        load(NATIVE, "some")


def test_what_was_compiled_is_found_again(cache, monkeypatch, tmp_path):
    """By source, options, compiler and processor; a library that does not load is named."""
    compiler(monkeypatch, tmp_path / "cc", COPIES)
    path = library.library(NATIVE, "some")
    assert path.parent == cache and path == library.library(NATIVE, "some")
    with pytest.raises(BackendError, match=rf"{path.name} does not load: .*Remove it"):
        load(NATIVE, "some")
    assert path.read_text() == "no library\n" and [*cache.iterdir()] == [path]
    assert cache.stat().st_mode & 0o777 == 0o700
    compiler(monkeypatch, tmp_path / "cc", "echo 1.1")
    assert library.library(NATIVE, "some") != path
    compiler(monkeypatch, tmp_path / "cc", "echo 1.0")
    assert library.library(NATIVE, "some") == path
    assert library.library(NATIVE, "other") != path
    assert library.library(("-O0",), "some") != path
    source = tmp_path / "kernels.cpp"
    source.write_text("int main() {}")
    monkeypatch.setattr(library, "SOURCE", source)
    assert library.library(NATIVE, "some") != path


@pytest.fixture
def kept(cache, monkeypatch, tmp_path):
    """A library that is there and would be loaded: which fails, in the loader, since it is none."""
    compiler(monkeypatch, tmp_path / "cc", COPIES)
    with pytest.raises(BackendError, match="does not load"):
        load(NATIVE, "some")
    return library.library(NATIVE, "some")


def refused(match):
    """Assert that loading stops before the loader sees the file, with a remedy that works."""
    with pytest.raises(BackendError, match=rf"would run in this process.*{match}.*Remove it, or"):
        load(NATIVE, "some")


def test_a_library_that_others_can_write_is_refused(kept):
    for path, mode in ((kept, 0o664), (kept, 0o646), (kept.parent, 0o770), (kept.parent, 0o707)):
        before = path.stat().st_mode
        path.chmod(mode)
        refused(f"others can write it .mode {mode:04o}")
        path.chmod(before)
    with pytest.raises(BackendError, match="does not load"):
        load(NATIVE, "some")


def test_a_folder_that_others_can_write_is_not_even_written_to(kept):
    kept.unlink()
    kept.parent.chmod(0o777 | 0o1000)
    refused("others can write it .mode 1777")
    assert [*kept.parent.iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("which", ["library", "folder"])
def test_a_library_that_belongs_to_somebody_else_is_refused(kept, which):
    os.chown(kept if which == "library" else kept.parent, 12345, -1)
    refused("it belongs to user 12345, not to you")


def test_files_of_another_user_are_refused_to_one_who_is_not_root(kept, monkeypatch):
    owner = kept.stat().st_uid
    if owner == 0:  # root's files are everybody's: a system's administrator put them there
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        with pytest.raises(BackendError, match="does not load"):
            load(NATIVE, "some")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        refused(f"it belongs to user {owner}")


def test_a_link_in_the_place_of_a_library_is_not_followed(kept, tmp_path):
    kept.rename(tmp_path / "elsewhere.so")
    kept.symlink_to(tmp_path / "elsewhere.so")
    refused("symbolic link")


def test_a_pipe_in_the_place_of_a_library_does_not_hang(kept):
    kept.unlink()
    os.mkfifo(kept, 0o600)
    refused("neither a file nor a folder")


def test_the_folder_that_is_loaded_from_is_the_one_that_was_looked_at(kept, monkeypatch):
    """Somebody puts another in its place between: the loader still gets the first."""
    opened, seen = library.open_trusted, []

    def swapped(path, within=None):
        descriptor = opened(path, within)
        if within is not None:
            os.rename(kept.parent, kept.parent.with_name("moved"))
            kept.parent.mkdir()
            kept.write_text("another")
        return descriptor

    def loader(name):
        with open(name) as file:
            seen.append(file.read())

    monkeypatch.setattr(library, "open_trusted", swapped)
    monkeypatch.setattr(library.ctypes, "CDLL", loader)
    load(NATIVE, "some")
    assert seen == ["no library\n"] and kept.read_text() == "another"


COMPILES = """
import subprocess
from tfmq_fx.backends.cpu import kernels, library
calls, run = [], subprocess.run
library.subprocess.run = lambda command, **kw: (calls.append(command), run(command, **kw))[1]
kernels.load_plain()
print(sum("-shared" in command for command in calls))
import torch
print(torch.ops.tfmq_fx_plain.cpu_norm(torch.ones(1, 1, 2, 3), 0, None, None, 0.0, None, None,
    False, [torch.ones(1)], [7], [3], 255, [0, 0, 0, 0]).unique().tolist())
"""


@pytest.mark.slow
@pytest.mark.sample
def test_kernels_compile_once(cache):
    for compiled in ("1", "0"):
        done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True)
        assert done.stdout.split("\n")[:2] == [compiled, "[8]"], done.stderr
    assert len([*cache.iterdir()]) == 1
