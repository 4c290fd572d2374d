"""leftovers: what a killed process leaves is removed by the next; what a living one has stays."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.temporary_files import folder_beside, folder_of

pytest.importorskip("fcntl", reason="this system has no such locks")

MAKE = """
import os, signal, sys
from pathlib import Path
from tfmq_fx.core import temporary_files as leftovers
target = Path(sys.argv[1], "name")
class Owner: pass
owner = Owner()
with leftovers.folder_beside(target, "new") as new, leftovers.folder_beside(target, "part") as made:
    (new / "deep").mkdir()
    (new / "deep" / "content").write_text("x" * 1000)
    (made / "content").write_text("half of")
    path, _ = leftovers.folder_of(owner, "spill")
    (path / "1").write_text("values")
    print("made", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder for temporary files, and one that is written to; a process that has some in both."""
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    folder.mkdir(), temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(folder)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"made\n"
    yield folder, temporary, process
    process.kill()
    process.wait()
    process.stdin.close(), process.stdout.close()


def names(*folders):
    return sorted(path.name for folder in folders for path in folder.iterdir())


def make_some(folder):
    """What is there while this process has some of its own, less that."""

    class Owner:
        pass

    owner = Owner()
    with (
        folder_beside(folder / "name", "new") as new,
        folder_beside(folder / "name", "part") as made,
    ):
        path, remove = folder_of(owner, "spill")
        assert path.stat().st_mode & 0o777 == 0o700
        own = {new.name, made.name, path.name}
        found = names(folder, path.parent)
        remove()
    assert own <= set(found)
    return [name for name in found if name not in own]


def test_what_a_killed_process_left_is_removed_and_no_sooner(elsewhere):
    folder, temporary, process = elsewhere
    before = names(folder, temporary)
    assert len(before) == 3 and make_some(folder) == before == names(folder, temporary)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(folder, temporary) == before  # nobody was there to remove it
    assert make_some(folder) == [] == names(folder, temporary)


def test_a_process_that_ends_leaves_nothing(elsewhere):
    folder, temporary, process = elsewhere
    process.stdin.close()
    assert process.wait() == 0 and names(folder, temporary) == []


def test_only_what_is_named_so_and_of_that_kind_is_removed(tmp_path):
    """A link is not followed, and names that users give are none of ours."""
    folder, kept = tmp_path / "folder", tmp_path / "kept"
    folder.mkdir(), kept.mkdir()
    (kept / "work").write_text("years")
    (folder / f".name.new-{'0' * 16}").symlink_to(kept)
    os.mkfifo(folder / f".name.new-{'1' * 16}")
    for name in (".name.new-", ".name.new-mine", f".other.new-{'2' * 16}", f"name.new-{'3' * 16}"):
        (folder / name).mkdir()
    (folder / f".name.new-{'4' * 16}").mkdir()
    before = names(folder)
    with folder_beside(folder / "name", "new"):
        pass
    assert names(folder) == [name for name in before if "4" not in name]
    assert (kept / "work").read_text() == "years"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_what_belongs_to_another_user_is_left_alone(tmp_path):
    other = tmp_path / f".name.new-{'0' * 16}"
    other.mkdir()
    os.chown(other, 12345, -1)
    with folder_beside(tmp_path / "name", "new"):
        pass
    assert other.exists()


def test_a_file_that_is_written_again_has_no_halves_beside_it(tmp_path):
    path = tmp_path / "file"
    half = tmp_path / f".file.part-{'a' * 16}"
    half.mkdir()
    (half / "content").write_text("half of")
    write_whole(path, "whole", 0o600)
    assert [*tmp_path.iterdir()] == [path] and path.stat().st_mode & 0o777 == 0o600


def test_names_and_pages_are_gone_with_their_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"tfmq_fx-spill-{'b' * 16}").mkdir()
    with ActivationStore(0) as spill:
        value = torch.arange(5.0)
        packed = spill.pack(value)
        (folder,) = tmp_path.iterdir()
        assert folder.name.startswith("tfmq_fx-spill-") and not folder.name.endswith("b" * 16)
        assert torch.equal(spill.unpack(packed), value)
    assert names(tmp_path) == []
