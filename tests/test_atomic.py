"""A save is whole or has not happened, whatever ends it, and leaves nothing behind."""

import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from lookstep.atomic import replacing
from lookstep.safetensors import Reader, write

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
not_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")


def python(code, *args, **kwargs):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=100, **kwargs)


def save(path, text):
    with replacing(path) as file:
        file.write(text)


@pytest.fixture
def path(tmp_path):
    """A file that was saved before."""
    save(tmp_path / "x", b"before")
    return tmp_path / "x"


def is_as_before(path):
    return path.read_bytes() == b"before" and os.listdir(path.parent) == [path.name]


def test_the_file_is_replaced_when_the_block_ends(path):
    with replacing(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_changes_nothing(error, path):
    def fail():
        with replacing(path) as file:
            file.write(b"after")
            raise error

    with pytest.raises(error):
        fail()
    assert is_as_before(path)


@posix
def test_the_order_is_flush_rename_flush_the_folder(path, monkeypatch):
    calls = []

    def watched(name, function):
        def call(*args):
            is_folder = name == "fsync" and os.path.isdir(f"/dev/fd/{args[0]}")
            calls.append(name + (" folder" if is_folder else ""))
            return function(*args)

        monkeypatch.setattr(os, name, call)

    watched("fsync", os.fsync)
    watched("replace", os.replace)
    save(path, b"after")
    assert calls == ["fsync", "replace", "fsync folder"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_of_the_disk_changes_nothing(name, path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left"):
            save(path, b"after")
    assert is_as_before(path)


@posix
@pytest.mark.parametrize("limit", [0, 10, 50_000, 1_000_000])
def test_a_full_disk_changes_nothing(limit, tmp_path):
    path = tmp_path / "x"
    write(path, {"w": np.zeros(3)})
    before = path.read_bytes()
    code = """if True:
        import resource, sys
        import numpy as np
        from lookstep.safetensors import write
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores the signal that goes with it.
        try:
            write(sys.argv[1], {"a": np.ones(5), "b": np.ones(500_000), "c": np.ones(3, "u1")})
        except OSError as error:
            print(error)"""
    run = python(code, path, str(limit))
    assert "File too large" in run.stdout, run.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_is_none(path):
    with pytest.raises(OSError, match="x"):
        save(path / "y", b"after")
    with pytest.raises(FileNotFoundError):
        save(path.parent / "none" / "y", b"after")
    assert is_as_before(path)


@not_root
def test_no_permission(path):
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        save(path, b"after")
    path.chmod(0o644)
    path.parent.chmod(0o555)
    with pytest.raises(PermissionError):
        save(path, b"after")
    path.parent.chmod(0o755)
    assert is_as_before(path)


def test_a_file_that_is_read_only(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # As it would be for anyone but root.
    with pytest.raises(PermissionError, match="cannot save: the file is read-only"):
        save(path, b"after")
    assert is_as_before(path)


@posix
def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, error in (("pipe", OSError), ("folder", IsADirectoryError)):
        with pytest.raises(error, match="not a regular file"):
            save(tmp_path / name, b"after")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


@posix
def test_links_are_followed(path, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, target in (("link", path), ("dangling", tmp_path / "new")):
        (elsewhere / name).symlink_to(target)
        save(elsewhere / name, b"after")
        assert (elsewhere / name).is_symlink()
        assert target.read_bytes() == b"after"
    (elsewhere / "loop").symlink_to(elsewhere / "loop")
    with pytest.raises(OSError, match="loop"):
        save(elsewhere / "loop", b"after")
    assert sorted(os.listdir(elsewhere)) == ["dangling", "link", "loop"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "new", "x"]


def test_a_relative_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    save("x", b"after")
    assert path.read_bytes() == b"after"


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_the_umask_s(mask, tmp_path):
    path = tmp_path / "x"
    for left_over in (False, True):
        if left_over:
            (tmp_path / ".x.saving").write_bytes(b"half")
            (tmp_path / ".x.saving").chmod(0o640)
        before = os.umask(mask)
        try:
            save(path, b"after")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        assert os.listdir(tmp_path) == ["x"]


@posix
def test_what_lies_in_the_way_is_not_written_through(path, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / ".x.saving").symlink_to(precious)
    with pytest.raises(OSError, match="saving"):
        save(path, b"after")
    (tmp_path / ".x.saving").unlink()
    os.link(precious, tmp_path / ".x.saving")
    save(path, b"after")
    assert precious.read_bytes() == b"precious"
    os.mkfifo(tmp_path / ".x.saving")
    save(path, b"after")
    assert sorted(os.listdir(tmp_path)) == ["precious", "x"]


def test_one_saver_at_a_time(path):
    with replacing(path) as file:
        file.write(b"first")
        with pytest.raises(BlockingIOError, match="another process or thread is saving to it"):
            save(path, b"second")
        failed = []

        def other():
            try:
                save(path, b"third")
            except BlockingIOError as error:
                failed.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert failed
        code = "import sys; from lookstep.atomic import replacing\nwith replacing(sys.argv[1]): pass"
        assert "BlockingIOError: " in python(code, path).stderr
    assert path.read_bytes() == b"first"
    save(path, b"fourth")
    assert path.read_bytes() == b"fourth"
    assert os.listdir(path.parent) == ["x"]


@posix
def test_savers_that_race_leave_one_whole_file(path):
    code = """if True:
        import sys
        from lookstep.atomic import replacing
        saved = 0
        for i in range(300):
            try:
                with replacing(sys.argv[1]) as file:
                    for _ in range(3):
                        file.write(sys.argv[2].encode() * 9999)
                saved += 1
            except BlockingIOError:
                pass
        print(saved)"""
    start = [sys.executable, "-c", code, path]
    savers = [subprocess.Popen([*start, name], stdout=subprocess.PIPE, text=True) for name in "abc"]
    looks = 0
    while any(saver.poll() is None for saver in savers):
        content = path.read_bytes()
        assert content in (b"before", b"a" * 29997, b"b" * 29997, b"c" * 29997)
        looks += 1
    assert all(int(saver.communicate()[0]) > 0 and saver.returncode == 0 for saver in savers)
    assert looks
    assert os.listdir(path.parent) == ["x"]


KILLED = """if True:
    import itertools, sys
    import numpy as np
    from lookstep.safetensors import write
    print("ready", flush=True)
    for i in itertools.count(1):
        write(sys.argv[1], {name: np.full(30_000, i) for name in "abcdefgh"}, {"i": str(i)})"""


@posix
def test_a_killed_save_leaves_the_file_before_or_after(tmp_path):
    path, rng, left_overs = tmp_path / "x", random.Random(0), 0
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE) as saver:
            assert saver.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                saver.wait(rng.uniform(0.01, 0.1))
            saver.kill()
        left_overs += ".x.saving" in os.listdir(tmp_path)
        if path.exists():
            with Reader(path) as file:
                assert all((file.read(name) == int(file.metadata["i"])).all() for name in "abcdefgh")
    assert left_overs
    write(path, {})
    assert os.listdir(tmp_path) == ["x"]


@posix
def test_a_save_that_is_killed_half_way(path):
    code = """if True:
        import os, signal, sys
        from lookstep.atomic import replacing
        with replacing(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)"""
    assert python(code, path).returncode == -signal.SIGKILL
    assert sorted(os.listdir(path.parent)) == [".x.saving", "x"]
    assert path.read_bytes() == b"before"
    save(path, b"after")
    assert os.listdir(path.parent) == ["x"]


@posix
def test_a_file_system_without_locks(path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    save(path, b"after")
    assert path.read_bytes() == b"after"
    # Nothing tells the two apart then, but the first one notices.
    first = replacing(path)
    first.__enter__().write(b"first")
    save(path, b"second")
    with pytest.raises(BlockingIOError):
        first.__exit__(None, None, None)
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["x"]
