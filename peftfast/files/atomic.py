"""Reading and writing: atomic files, two files as one, and where the file of a folder or Hub repository is.

What is whole here is so whenever a process is killed: the system has what was written, and shows it to whoever reads.
Nothing waits until a disk has it too (fsync), which took longer than everything else in saving an adapter. That is for
when the power fails, and there these files are as safe as those of safetensors, torch.save and transformers, which do
not wait either: ext4 and btrfs write a file down before another has its name, other file systems need not. Databases
wait, because they answer for what they have confirmed; who wants that of an adapter calls `os.sync()` after saving.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from peftfast.errors import check_path

try:
    import fcntl
except ImportError:  # Windows: other processes are not kept out, other threads are
    fcntl = None

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

Content = bytes | Callable[[str], None]  # the bytes, or a function that writes them to the path it is given


class _FolderLock:
    """One per folder and process: threads wait for each other, the first one in keeps other processes out."""

    def __init__(self) -> None:
        self.threads = threading.RLock()
        self.depth = 0


def _no_locks() -> None:
    """At the beginning, and in a child process, where no thread is left that would give back what others had."""
    global _locks, _looking
    _locks, _looking = WeakValueDictionary(), threading.Lock()


_locks: WeakValueDictionary[str, _FolderLock]  # of folders that somebody has locked or waits for
_looking: threading.Lock
_no_locks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_no_locks)

#: Of two forms of a first file, the one that readers prefer; removing it is what makes the other one valid.
_READ_BEFORE = {WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}

_END = 1 << 20  # bytes


def write_atomically(path: Path, content: Content) -> None:
    """Write a file so that whoever looks sees the old content or the new one, whole, also if the writer is killed.

    Args:
        path: the target; its folder must exist.

    Raises:
        OSError: disk full, read-only folder, naming the file; the old file is untouched and no temporary is left.
    """
    _place(_write_beside(path, content), path)


def write_pair(
    folder: Path, first: tuple[str, Content], second: tuple[str, bytes], obsolete: tuple[str, ...] = ()
) -> None:
    """Write two files that belong together, so that a reader who asks `find_file` for them gets both old or both new,
    also if the writer is killed at any point, and also with several writers.

    No file system replaces two files at once. So the second is first written under a name with the digest of the new
    first one; whoever finds such a file, and the first file has that digest, knows that the writer was stopped between
    the two, and takes it.

    Args:
        first, second: (name, content). obsolete: names that would be read instead of `first`; removed.

    Raises:
        OSError: disk full, read-only folder, naming the file; both old files are untouched and no temporary is left.
    """
    with locked(folder, exclusive=True):
        for name in (first[0], *obsolete, second[0], f".{second[0]}"):
            _remove(folder.glob(f".{name}.*.tmp"))  # of writers that were killed; nobody else writes now
        unfinished = _unfinished(folder, second[0])
        if unfinished is not None:  # two unfinished pairs at once could not be told apart
            os.replace(unfinished, folder / second[0])
        _remove(folder.glob(f".{second[0]}.*.next"))
        temporary = _write_beside(folder / first[0], first[1])
        next_second = folder / f".{second[0]}.{first[0]}.{_digest(temporary)}.next"
        try:
            written = temporary.parent / second[0]
            written.write_bytes(second[1])
            os.replace(written, next_second)
        except BaseException as e:
            _remove([temporary.parent, next_second])
            if isinstance(e, OSError):
                raise _unwritten(folder / second[0], e) from e
            raise
        try:
            _place(temporary, folder / first[0])
        except OSError:
            _remove([next_second])
            raise
        _remove(folder / name for name in obsolete)
        os.replace(next_second, folder / second[0])
        _remove(folder.glob(f".{second[0]}.*.next"))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes `path`, new or empty until then, when the block ends without an error. An empty
    one that is there stays the folder that it is, which may be where somebody works, or another disk.

    Raises:
        OSError: `path` is there and not empty by then; what was written is gone.
    """
    path = Path(os.path.realpath(path))
    there = path.is_dir()
    parent = path if there else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    room = _room(parent, path.name)
    moved = []
    try:
        yield room
        if there:
            if os.listdir(path) != [room.name]:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            # a config tells readers that there is a model: it comes last
            for one in sorted(room.iterdir(), key=lambda one: one.name == "config.json"):
                moved.append(one.rename(path / one.name))
            room.rmdir()
        else:
            with suppress(FileNotFoundError):
                path.rmdir()
            os.rename(room, path)
    except BaseException:
        _remove([room, *moved])
        raise


@contextmanager
def locked(folder: str | os.PathLike, exclusive: bool = False) -> Iterator[None]:
    """Keep writers of a folder out, and with `exclusive` its readers too, in this process and in others. Where the
    file system has no locks, only this process's threads are kept out."""
    path = os.path.realpath(folder)
    with _looking:
        lock = _locks.setdefault(path, _FolderLock())
    with lock.threads:
        handle = None
        lock.depth += 1
        try:
            if fcntl is not None and lock.depth == 1:
                with suppress(OSError):
                    handle = os.open(path, os.O_RDONLY)
                    fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            lock.depth -= 1
            if handle is not None:
                with suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the file open as well
                os.close(handle)


def find_file(
    model_id: str | os.PathLike,
    name: str,
    *,
    subfolder: str | None = None,
    required: bool = False,
    at_hand: bool = False,
    **hub: Any,
) -> str | None:
    """Path of `name` in a local folder or, only if `model_id` is no folder, in a Hub repository; None if it is not
    there.

    Args:
        model_id: folder or repository id.
        name: file name, relative to `subfolder`.
        subfolder: must stay inside the folder.
        required: whether it is an error that the Hub cannot be asked for what the local cache does not have.
        at_hand: what the local cache has of a repository is good enough, and the Hub is asked for the rest only if it
            answers at once: without a network, downloading tries for half a minute.
        hub: arguments of `hf_hub_download` (revision, token, cache_dir, local_files_only, ...).
    """
    check_path(model_id, "A folder or a Hub repository")
    for part in (name, subfolder or ""):
        if os.path.isabs(part) or ".." in Path(part).parts:
            raise ValueError(f"{part!r} leaves the adapter's folder; give a path inside {str(model_id)!r}")
    local = os.path.join(model_id, subfolder) if subfolder else os.fspath(model_id)
    if os.path.isdir(model_id):
        if subfolder and not Path(local).resolve().is_relative_to(Path(model_id).resolve()):
            raise ValueError(f"{subfolder!r} is a link that leaves the adapter's folder {str(model_id)!r}")
        return _unfinished(Path(local), name) or _existing(os.path.join(local, name))
    if os.path.exists(model_id):
        raise ValueError(
            f"Can't find {name!r} at {str(model_id)!r}, which is a file; expected a folder or a Hub repository id"
        )
    from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    hub = {k: v for k, v in hub.items() if v is not None}
    try:
        if at_hand and not hub.get("local_files_only"):
            place, revision = (os.fspath(model_id), f"{subfolder}/{name}" if subfolder else name), hub.get("revision")
            cached = try_to_load_from_cache(*place, hub.get("cache_dir"), revision)
            if isinstance(cached, str):
                return cached
            if not file_exists(*place, revision=revision, token=hub.get("token")):
                return None
        return hf_hub_download(os.fspath(model_id), name, subfolder=subfolder, **hub)
    except EntryNotFoundError as e:
        if required and isinstance(e, LocalEntryNotFoundError):
            raise ValueError(f"Can't find {name!r} at {str(model_id)!r}: {e}") from e
        return None
    except HFValidationError as e:
        raise ValueError(
            f"Can't find {name!r} at {str(model_id)!r}, neither an existing folder nor a Hub repository id: {e}"
        ) from e
    except Exception as e:  # offline, no such repository, no permission: all mean that the file cannot be had
        raise ValueError(f"Can't find {name!r} at {str(model_id)!r}: {type(e).__name__}: {e}") from e


def _existing(path: str) -> str | None:
    return path if os.path.isfile(path) else None


def _unfinished(folder: Path, name: str) -> str | None:
    """The second file of a pair whose writer was stopped after it had replaced the first."""
    for path in folder.glob(f".{name}.*.next"):
        first, _, digest = path.name.removeprefix(f".{name}.").removesuffix(".next").rpartition(".")
        if first in _READ_BEFORE and (folder / _READ_BEFORE[first]).exists():
            continue  # the new first file is not the one that is read, so the old pair is still the valid one
        with suppress(OSError):
            written_since = (folder / name).is_file() and (folder / name).stat().st_mtime_ns > path.stat().st_mtime_ns
            if not written_since and _digest(folder / first) == digest:
                return str(path)
    return None


def _room(parent: Path, name: str) -> Path:
    """A new folder for what is to become `name`. One of `tempfile`'s is its user's alone, and so is, on Windows, what
    was written in there."""
    room = parent / f".{name}.{secrets.token_hex(8)}.tmp"
    os.mkdir(room)
    return room


def _write_beside(path: Path, content: Content) -> Path:
    """Write to a temporary file; returns its path. It is alone in a folder beside `path`, because safetensors writes
    temporary files of its own next to it, under names that nobody could tell from a user's."""
    room = None
    try:
        room = _room(path.parent, path.name)
        temporary = room / path.name
        if callable(content):
            content(str(temporary))
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+"):
            pass  # closing is where a network's file system says that it had no room, and safetensors does not ask
        # a checkpoint is as readable as any other file of this user
        os.chmod(temporary, 0o666 & ~_UMASK)
    except BaseException as e:
        if room is not None:
            _remove([room])
        if isinstance(e, (OSError, RuntimeError)):  # a full disk is a RuntimeError to torch.save
            raise _unwritten(path, e) from e
        raise
    return temporary


def _unwritten(path: Path, error: Exception) -> OSError:
    """The error of the same class and number, with the name that the caller knows; many have none, or a temporary's."""
    number = getattr(error, "errno", None)
    reason = error.strerror if number is not None else str(error)
    return OSError(
        errno.EIO if number is None else number,
        f"could not be written, what was there is untouched: {reason}",
        str(path),
    )


def _read_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


_UMASK = _read_umask()  # asking for it changes it for a moment, which no other thread may see: asked once


def _place(temporary: Path, path: Path) -> None:
    """Move what `_write_beside` wrote to where it belongs."""
    try:
        os.replace(temporary, path)
    except OSError as e:
        raise _unwritten(path, e) from e
    finally:
        _remove([temporary.parent])


def _remove(paths: Any) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _digest(path: str | os.PathLike) -> str:
    """Of a file's first and last megabyte, where the checksums of all tensors are: in the first of our safetensors, in
    the last of what `torch.save` writes. Reading all of a large adapter again takes longer than writing it."""
    with open(path, "rb") as f:
        first = zlib.crc32(f.read(_END))
        f.seek(max(_END, os.fstat(f.fileno()).st_size - _END))
        return f"{zlib.crc32(f.read(), first):08x}"
