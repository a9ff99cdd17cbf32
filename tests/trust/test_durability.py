"""A full disk and a folder that cannot be written: the error names the file, the old adapter is whole."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trust.attacks import CONFIG, WEIGHTS, trained, versions, whole

from peftfast.files import atomic
from peftfast.files.atomic import _digest, whole_folder
from peftfast.files.io import save_adapter, write_safetensors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and resource limits")
PICKLE = "adapter_model.bin"


@pytest.fixture
def folder():
    """An adapter in a folder that other users can enter, unlike pytest's."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    save_adapter(root / "adapter", *versions()[0], auto_mapping=None)
    yield root / "adapter"
    (root / "adapter").chmod(0o755)
    shutil.rmtree(root)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} | {
        str(p.relative_to(folder)): b"folder" for p in folder.rglob("*") if p.is_dir()
    }


def in_a_process(act) -> None:
    """Limits and users are the process's, so each test gets one of its own."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_saved_is_for_whom_other_files_are(folder, monkeypatch):
    """From Python 3.12.4 on, what is moved out of a folder of mode 0o700 stays its user's alone on Windows."""
    modes, make = [], os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, mode=0o777, **more: (modes.append(mode), make(path, mode, **more))[1])
    save_adapter(folder, *versions()[1], auto_mapping=None)
    with whole_folder(folder.parent / "new"):
        assert modes and set(modes) == {0o777}
    umask = os.umask(0)
    os.umask(umask)
    assert (folder.parent / "new").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.9])
def test_no_room_for_the_weights(folder, safe, part):
    import resource

    before = contents(folder)
    cfg, tensors = versions()[1]
    name = WEIGHTS if safe else PICKLE
    save_adapter(folder.parent / "size", cfg, tensors, auto_mapping=None, safe=safe)
    limit = int(part * (folder.parent / "size" / name).stat().st_size)

    def act():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="could not be written, what was there is untouched") as error:
            save_adapter(folder, cfg, tensors, auto_mapping=None, safe=safe)
        assert error.value.filename == str(folder / name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert contents(folder) == before
        assert whole(folder) is None
        save_adapter(folder, cfg, tensors, auto_mapping=None, safe=safe)  # once there is room again

    in_a_process(act)
    assert whole(folder) is None
    assert contents(folder) != before
    assert not [n for n in contents(folder) if n.startswith(".")]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("when", ["config", "closing of weights", "replace of weights"])
def test_no_room_later(folder, monkeypatch, safe, when):
    """The disk can be full after the weights were written, or only say so when they are closed."""
    before, calls = contents(folder), []
    cfg, tensors = versions()[1]

    def full(original, at):
        def act(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return act

    if when == "config":
        monkeypatch.setattr(Path, "write_bytes", full(Path.write_bytes, 1))
    elif when == "replace of weights":
        monkeypatch.setattr(os, "replace", full(os.replace, 2))  # the first one is the config's, under its passing name
    else:

        class Written(io.FileIO):
            __exit__ = full(lambda file, *_: file.close(), 1)

        modes = {"rb": io.FileIO, "rb+": Written}
        monkeypatch.setattr(atomic, "open", lambda path, mode: modes[mode](path, mode), raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        save_adapter(folder, cfg, tensors, auto_mapping=None, safe=safe)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    name = CONFIG if "config" in when else WEIGHTS if safe else PICKLE
    assert name in str(error.value) and str(folder) in str(error.value)
    assert contents(folder) == before
    assert whole(folder) is None


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_folder_that_cannot_be_written(folder, safe):
    before = contents(folder)
    cfg, tensors = versions()[1]

    def act():
        folder.chmod(0o555)
        if os.getuid() == 0:  # root may write anywhere
            os.setuid(65534)
        with pytest.raises(PermissionError) as error:
            save_adapter(folder, cfg, tensors, auto_mapping=None, safe=safe)
        assert error.value.filename == str(folder / (WEIGHTS if safe else PICKLE))
        with pytest.raises(PermissionError) as error:
            write_safetensors(folder / "x.safetensors", tensors)
        assert error.value.filename == str(folder / "x.safetensors")
        with pytest.raises(PermissionError, match=str(folder / "new")):
            trained().save_pretrained(folder / "new")

    in_a_process(act)
    assert contents(folder) == before
    assert whole(folder) is None


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_nothing_waits_for_the_disk(folder, monkeypatch, safe):
    """Which took longer than all the rest of saving, and is not what a killed process needs."""
    waited = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *which: waited.append(which), raising=False)
    trained().save_pretrained(folder, safe_serialization=safe)
    assert not waited


def test_saving_again_makes_one_folder_to_write_in_and_leaves_the_card(tmp_path, monkeypatch):
    """Each took half a millisecond, and a card with the same text again one more."""
    model, rooms, make = trained(), [], os.mkdir
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").stat()
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: rooms.append(path) or make(path, *mode))
    model.save_pretrained(tmp_path)
    after = (tmp_path / "README.md").stat()
    assert len([path for path in rooms if str(path).endswith(".tmp")]) == 1
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_large_files_are_told_apart_by_their_ends(folder, monkeypatch, safe):
    """A writer that was stopped between the two files of an adapter is known by the first one's digest."""
    read, digests, (cfg, _) = [], [], versions()[1]
    counted = SimpleNamespace(crc32=lambda data, *start: read.append(len(data)) or zlib.crc32(data, *start))
    monkeypatch.setattr(atomic, "zlib", counted)
    weights = torch.arange(1 << 20, dtype=torch.float32)
    for value in (weights[1 << 19].item(), 0.5):  # in the middle of four megabytes
        weights[1 << 19] = value
        save_adapter(folder, cfg, {"weights": weights}, auto_mapping=None, safe=safe)
        digests.append(_digest(folder / (WEIGHTS if safe else PICKLE)))
    assert digests[0] != digests[1]
    assert sum(read) == 2 * 2 * 2**21


def test_a_process_forked_while_a_thread_writes_shares_no_lock(folder):
    """Workers of a DataLoader that are started while a checkpoint is written: neither they nor the next writer wait for
    a lock that nobody has."""
    written, inside = threading.Event(), threading.Event()

    def write():
        with atomic.locked(folder, exclusive=True):
            inside.set()
            written.wait()

    writer = threading.Thread(target=write)
    writer.start()
    inside.wait()
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with atomic.locked(folder):
            os.write(begin, b"read")
        signal.pause()
    os.close(begin)
    written.set()
    writer.join()
    try:
        assert os.read(end, 4) == b"read"  # nothing where the alarm has ended the child
        with atomic.locked(folder, exclusive=True):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.close(end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_no_trace_of_a_folder_is_left(folder):
    """A server reads adapters from ever new ones."""
    before, opened = len(atomic._locks), len(os.listdir("/dev/fd"))
    with atomic.locked(folder, exclusive=True), atomic.locked(folder):
        assert len(atomic._locks) == before + 1
    assert len(atomic._locks) == before and len(os.listdir("/dev/fd")) == opened
