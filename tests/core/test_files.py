"""files: complete or not there, whatever stands in the way."""

import os
import tempfile
from pathlib import Path

import pytest

from tfmq_fx.core.files import cache_folder, distrusted, make_private, open_trusted, write_whole


@pytest.mark.parametrize("content", [b"\x00\xff", "ä\n", b"", "x" * 100_000])
def test_text_and_bytes_are_written_over_what_was_there(tmp_path, content):
    path = tmp_path / "file"
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    def full(*args):
        raise OSError("no space left")

    path = tmp_path / "file"
    write_whole(path, "before")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "after")
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_a_place_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "file", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_cache_is_where_it_is_wanted_and_a_user_without_a_home_has_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TFMQ_FX_CACHE", "near")
    assert cache_folder() == Path.cwd() / "near"
    monkeypatch.setenv("TFMQ_FX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tfmq_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder() == tmp_path / "me" / ".cache" / "tfmq_fx"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"tfmq_fx-{os.geteuid()}"


def test_folders_are_made_for_their_user_alone(tmp_path):
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
        (tmp_path / "a" / "b").chmod(0o755)
        make_private(tmp_path / "a" / "b")  # what is there stays as it is
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(OSError, match="file"):
            make_private(wrong)


@pytest.mark.parametrize("mode, reason", [
    (0o644, None), (0o755, None), (0o4755, None), (0o664, "others can write it .mode 0664"),
    (0o602, "mode 0602"), (0o1777, "mode 1777"),
])  # fmt: skip
def test_what_others_can_write_is_told(tmp_path, mode, reason):
    path = tmp_path / "file"
    path.write_text("content")
    path.chmod(mode)
    found = distrusted(path.stat())
    assert (found is None) == (reason is None)
    if reason is None:
        with open(open_trusted(path)) as file:
            assert file.read() == "content"
    else:
        with pytest.raises(PermissionError, match=reason):
            open_trusted(path)


def test_root_is_trusted_and_other_users_are_not(tmp_path, monkeypatch):
    info = tmp_path.stat()
    values = {name: getattr(info, name) for name in ("st_mode", "st_uid")}
    for owner, user, is_trusted in ((0, 0, True), (0, 7, True), (7, 7, True), (7, 0, False)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        made = type("Info", (), values | {"st_mode": 0o100600, "st_uid": owner})
        assert (distrusted(made) is None) == is_trusted
