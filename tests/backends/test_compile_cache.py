"""artifact: what the compiler made is read from a file, or written to it, and files that hold
something else are refused."""

import os
import zipfile

import pytest
import torch

from tests.backends.cpu.cases import needs_kernels
from tests.backends.test_inductor import data, needs_compiler, whole
from tfmq_fx.backends import compile_cache
from tfmq_fx.backends.compile_cache import with_artifact
from tfmq_fx.backends.inductor import compile_graph
from tfmq_fx.core.errors import ConfigError

KERNEL, CHECK = "ab/cabc.main.so", "cd/ccde.so"


@pytest.fixture
def torchs(monkeypatch, tmp_path):
    """torch's artifacts: what is loaded, what there is to save, and the folder of its cache."""

    class Torchs:
        loaded, saved, folder = [], (b"made", None), tmp_path / "inductor"

    def load(content):
        Torchs.loaded.append(content)
        return "found"

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: Torchs.saved)
    monkeypatch.setattr(compile_cache, "_folder", lambda: Torchs.folder)
    monkeypatch.setattr(compile_cache, "_machine", lambda: "here")
    return Torchs


def compiling(misses):
    """A call that compiles `misses` graphs."""

    def run():
        from torch._dynamo.utils import counters

        counters["inductor"]["fxgraph_cache_miss"] += misses
        return "result"

    return run


def written(path, caches=b"before", machine="here", libraries=()):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("caches", caches)
        file.writestr("machine", machine)
        for name in libraries:
            file.writestr(name, b"library")
    path.chmod(0o600)
    return path


def entries(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_first_call_writes_the_file(torchs, tmp_path):
    path = tmp_path / "deep" / "model.bin"
    assert with_artifact(path, compiling(1)) == "result"
    assert entries(path) == {"caches": b"made", "machine": b"here"} and torchs.loaded == []
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    "misses, machine, after",
    [(0, "here", b"before"), (2, "here", b"made"), (0, "elsewhere", b"made")],
)
def test_a_file_is_read_and_written_again_where_it_did_not_hold_all(
    torchs, tmp_path, misses, machine, after
):
    path = written(tmp_path / "model.bin", machine=machine)
    assert with_artifact(path, compiling(misses)) == "result"
    assert torchs.loaded == [b"before"] and entries(path)["caches"] == after


def test_a_compiler_that_kept_nothing_writes_nothing(torchs, tmp_path, caplog):
    torchs.saved = None
    assert with_artifact(tmp_path / "model.bin", compiling(1)) == "result"
    assert not (tmp_path / "model.bin").exists() and "model.bin is not written" in caplog.text


def test_libraries_are_written_that_are_loaded_or_check_the_compiler(torchs, tmp_path, monkeypatch):
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    sizes = {KERNEL: 0, "ab/cabd.main.so": 0, CHECK: 100, "cd/cbig.so": 5000}
    for name, size in sizes.items():
        place = torchs.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(name.encode())
        if size:
            place.with_suffix(".cpp").write_text("x" * size)
    (torchs.folder / "cd" / "calone.so").write_bytes(b"")
    monkeypatch.setattr(CppPythonBindingsCodeCache, "cache", {"cabc": None, "cgone": None})
    torchs.saved = None  # as of a graph with weights packed for oneDNN
    path = tmp_path / "model.bin"
    with_artifact(path, compiling(0))
    expected = {name: name.encode() for name in (KERNEL, CHECK)}
    assert entries(path) == {"caches": b"", "machine": b"here"} | expected
    with_artifact(path, compiling(0))
    assert torchs.loaded == []


@pytest.mark.parametrize("machine, there", [("here", True), ("elsewhere", False)])
def test_libraries_go_where_inductor_looks_on_machines_of_their_kind(
    torchs, tmp_path, machine, there
):
    path = written(tmp_path / "model.bin", machine=machine, libraries=[KERNEL, CHECK])
    kept = torchs.folder / CHECK
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"its own")
    with_artifact(path, compiling(0))
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    expected = {f"inductor/{KERNEL}"} if there else set()
    assert found == {"model.bin", f"inductor/{CHECK}"} | expected
    assert kept.read_bytes() == b"its own" and torchs.loaded == [b"before"]


def refused(path, match):
    """Assert that nothing of the file is used."""
    with pytest.raises(ConfigError, match=match):
        with_artifact(path, lambda: pytest.fail("compiled"))
    assert not list(path.parent.rglob("*.so"))


@pytest.mark.parametrize("name", [
    "../../evil.so", "ab/../../evil.so", "/evil.so", "ab/c.py", "ab//evil.so", "ab\\evil.so",
])  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(torchs, tmp_path, name):
    path = written(tmp_path / "model.bin", libraries=[KERNEL, name])
    refused(path, r"holds '.*', which `compile` writes into no such file\. Remove it")
    assert torchs.loaded == []


@pytest.mark.parametrize("key", ["/evil", "../evil", "ab/../../evil"])
def test_names_in_torchs_bundle_that_lead_elsewhere_are_refused(torchs, tmp_path, key):
    from torch._inductor.runtime.autotune_cache import AutotuneCacheArtifact
    from torch.compiler._cache import CacheArtifactManager

    with CacheArtifactManager.with_fresh_cache():
        CacheArtifactManager.record_artifact(AutotuneCacheArtifact.type(), key, {"x": 1})
        caches, _ = CacheArtifactManager.serialize()
    refused(written(tmp_path / "model.bin", caches=caches), rf"would write to '{key}', out of")
    assert torchs.loaded == []


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_a_file_that_others_can_write_is_refused(torchs, tmp_path, mode):
    path = written(tmp_path / "model.bin", libraries=[KERNEL])
    path.chmod(mode)
    refused(path, f"is code that would run.*others can write it .mode {mode:04o}.*chmod 600")
    path.chmod(0o600)
    assert with_artifact(path, compiling(0)) == "result"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_file_of_somebody_else_is_refused(torchs, tmp_path):
    path = written(tmp_path / "model.bin", libraries=[KERNEL])
    os.chown(path, 12345, -1)
    refused(path, "it belongs to user 12345, not to you .user 0.*chown")


def test_a_pipe_does_not_hang(torchs, tmp_path):
    os.mkfifo(tmp_path / "model.bin", 0o600)
    refused(tmp_path / "model.bin", "neither a file nor a folder")


def test_what_is_written_is_for_its_owner_alone(torchs, tmp_path):
    before = os.umask(0o002)  # as systems with a group for each user have it
    try:
        path = tmp_path / "deep" / "model.bin"
        with_artifact(path, compiling(1))
        assert with_artifact(path, compiling(0)) == "result"
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_torchs_that_anybody_can_write_is_refused(torchs, tmp_path):
    torchs.folder.mkdir()
    torchs.folder.chmod(0o1777)
    refused(tmp_path / "model.bin", "torch loads code from .*TORCHINDUCTOR_CACHE_DIR")
    torchs.folder.chmod(0o775)
    assert with_artifact(tmp_path / "model.bin", compiling(1)) == "result"


def test_a_cache_that_cannot_be_written_is_no_obstacle(torchs, tmp_path, caplog):
    torchs.folder.write_text("")
    path = written(tmp_path / "model.bin", libraries=[KERNEL])
    assert with_artifact(path, compiling(0)) == "result"
    assert "compiled code is not used" in caplog.text


def test_a_machine_is_its_processor_and_versions(monkeypatch):
    one = compile_cache._machine()
    assert one == compile_cache._machine()
    monkeypatch.setattr(compile_cache, "processor", lambda: "other")
    assert (other := compile_cache._machine()) != one

    def fail():
        raise OSError

    monkeypatch.setattr(compile_cache, "processor", fail)
    assert compile_cache._machine() not in (one, other)


def test_a_call_that_fails_writes_nothing(torchs, tmp_path):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with_artifact(tmp_path / "model.bin", fail)
    assert [*tmp_path.iterdir()] == [torchs.folder]


def test_folders_are_refused_before_anything_is_compiled(tmp_path):
    with pytest.raises(ConfigError, match=f"artifact='{tmp_path}' is a folder; name a file"):
        with_artifact(tmp_path, lambda: pytest.fail("compiled"))


@pytest.mark.parametrize("content", [b"no artifact", b"\x80\x04\x95", b"\x00" * 64, b"PK\x03\x04"])
def test_files_of_something_else_are_refused_and_kept(tmp_path, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"holds no compiled model\. Remove it, or name another"):
        with_artifact(path, lambda: pytest.fail("compiled"))
    assert path.read_bytes() == content


def test_what_torch_raises_is_the_cause(torchs, tmp_path, monkeypatch):
    def fail(content):
        raise RuntimeError("another version")

    path = written(tmp_path / "model.bin")
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", fail)
    with pytest.raises(ConfigError, match="holds no compiled model") as caught:
        with_artifact(path, compiling(0))
    assert str(caught.value.__cause__) == "another version"


def test_places_that_cannot_be_written_are_named(torchs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/model.bin' cannot be written: "):
        with_artifact(tmp_path / "file" / "model.bin", compiling(1))


def test_a_file_of_zeros_or_less_is_refused(torchs, tmp_path):
    path = written(tmp_path / "model.bin")
    content = bytearray(path.read_bytes())
    at = content.index(b"before")
    content[at : at + 6] = bytes(6)  # a checksum that is off
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no compiled model"):
        with_artifact(path, compiling(0))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other", b"")
    with pytest.raises(ConfigError, match="holds no compiled model"):
        with_artifact(path, compiling(0))
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="holds no compiled model"):
        with_artifact(path, compiling(0))


@needs_compiler
@needs_kernels
def test_a_start_with_the_file_compiles_nothing(tmp_path, dynamo, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor import cpp_builder
    from torch._inductor.utils import fresh_cache
    from torch.compiler._cache import CacheArtifactManager

    built, build = [], cpp_builder.CppBuilder.build

    def building(self):
        built.append(self)
        return build(self)

    monkeypatch.setattr(cpp_builder.CppBuilder, "build", building)
    model, path, seen = whole(), tmp_path / "model.bin", []
    x, t = data(seed=1)[0]
    for _ in range(2):
        dynamo.reset()
        counters.clear()
        CacheArtifactManager.clear()
        built.clear()
        with fresh_cache():
            run, _ = compile_graph(model.gm, artifact=path)
            (found,) = run(x, t)
            misses, hits = (counters["inductor"][f"fxgraph_cache_{n}"] for n in ("miss", "hit"))
            # a precompiled header, of which there is nothing to keep, is made whatever happens
            kernels = [b for b in built if not str(b.get_target_file_path()).endswith(".gch")]
            seen.append((misses, hits, len(kernels), found))
    CacheArtifactManager.clear()
    first, second = seen
    assert first[:2] == (1, 0) and first[2] > 0 and second[:3] == (0, 1, 0)
    assert torch.equal(first[3], second[3])
