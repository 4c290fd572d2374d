"""files: complete or not there, whatever stands in the way."""

import os

import pytest

from tfmq_fx.files import write_whole


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
