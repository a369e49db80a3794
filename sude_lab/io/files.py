"""Files and folders that are written whole or not at all.

Where nothing can be written, or the disk is full (`DiskFullError`), there is a `UserError`; what
was there before stays, and half-written files and new parent folders are removed.
"""

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from sude_lab.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NEARLY_FULL = 1 << 20  # bytes
PARTIAL = ".partial-"
"""How the names of files and folders begin that are being written."""
LOCK = ".writing.lock"
"""The file in a folder that is being filled, while it is."""


class DiskFullError(UserError):
    """The disk is full, or the share of it that one may use: what is tried next fails, too."""


def _full(path: Path) -> DiskFullError:
    return DiskFullError(f"No space is left on the disk to write {path}: free some and run again.")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Write the file `path` whole, or leave what was there before.

    Yields a path in the same folder, with the same suffix, for the body to create; it takes the
    place of `path` when the body succeeds.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file to write.")
    with _temporary_sibling(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)


def write_file(path: Path | str, content: str | bytes) -> None:
    """Write a file whole, a text in UTF-8; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Write the folder `path` whole, or not at all.

    Yields a new folder beside `path` for the body to fill; it is renamed when the body succeeds. An
    empty folder at `path` is replaced; nothing else is.
    """
    path = Path(os.path.abspath(path))
    _require_free(path)  # before the work, which may take minutes
    with _temporary_sibling(path) as temporary:
        _make_folder(temporary, path)  # /proc, for example, lets nobody write
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _require_free(path)  # again: another process may have been quicker
        if path.is_dir():
            path.rmdir()  # not every system renames onto an empty folder
        os.replace(temporary, path)


def require_own(folder: Path | str, mark: str, beginning: str, others: Sequence[str] = ()) -> None:
    """Check that the results about to be written take the place of nobody else's files."""
    path = Path(folder) / mark
    try:
        with path.open("rb") as stream:
            wrong = [] if stream.read(len(beginning)) == beginning.encode() else [mark]
    except FileNotFoundError:
        wrong = [name for name in others if path.with_name(name).exists()]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another --out.") from error
    if wrong:
        raise UserError(f"{path.with_name(wrong[0])} is not from this command: name another --out.")


@contextmanager
def locked(path: Path | str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that the file `path` stands for, for the body; yields whether it is held.

    Without `wait` it yields False at once where another process holds it. The lock is the system's
    and ends with the process that holds it, however that ends. In the file stands who holds it.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        _make_folder(path.parent)
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in _FULL:
            raise _full(path) from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be locked ({reason}): name another folder.") from error
    try:
        with suppress(OSError):  # on a full disk the lock counts without its words
            path.write_text(f"{socket.gethostname()} {os.getpid()} {time.time():.0f}\n")
        yield True
    finally:
        with suppress(OSError):  # before the release: whoever waits takes a file that is there
            path.unlink()
        lock.release()


def lock_holder(path: Path | str) -> str | None:
    """Return "host pid since" (since in seconds) of who holds a lock of `locked`; None: nobody."""
    from filelock import FileLock, Timeout

    path = Path(path)
    with suppress(OSError):
        try:
            if path.is_file():
                with FileLock(path, timeout=0):
                    return None
        except Timeout:
            return path.read_text(encoding="utf-8").strip() or "?"
    return None


@contextmanager
def sole_writer(path: Path | str, *, inside: bool = False) -> Iterator[None]:
    """Let nobody else write `path` as long as the body takes.

    With `inside` it is a folder that the body fills bit by bit: it is made here, and removed again
    where the body leaves it empty.
    """
    path = Path(os.path.abspath(path))
    if inside and path.is_file():
        raise UserError(f"{path} is a file: --out takes a folder.")
    lock = path / LOCK if inside else path.with_name(f".{_end(path.name)}{LOCK}")
    with _removed_if_empty(lock.parent), locked(lock, wait=False) as held:
        if not held:
            raise UserError(f"Another command is writing {path}: wait, or name another --out.")
        yield


def process_number() -> int:
    """The number of this process among those that were launched together; 0 is the main one."""
    numbers = (os.environ.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    return next((int(number) for number in numbers if number), 0)


def save_tensors(
    tensors: Mapping[str, Any], path: Path | str, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, for whoever may read new files here."""
    from safetensors.torch import save_file

    path = Path(path)
    path.touch()
    mode = path.stat().st_mode  # safetensors closes its files to everyone but their owner
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def write_table(path: Path | str, table: Any) -> None:
    """Write a table of pandas as CSV; its texts a spreadsheet shows, and takes for no formulas."""
    formula = ("=", "+", "-", "@", "\t", "\r")
    shown = table.map(lambda x: f"'{x}" if isinstance(x, str) and x.startswith(formula) else x)
    with atomic_write(path) as file:
        shown.to_csv(file, index=False)


def in_utf_8(text: str) -> str:
    """Return a text that can be written, also of a file's name in other bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def remove_partials(folder: Path | str) -> None:
    """Remove what killed processes left half written in a folder; none may be writing there now."""
    for path in list(Path(folder).rglob(f"{PARTIAL}*")):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """A fresh name in the folder of `path`; on failure nothing of it stays."""
    # Not `tempfile`: its files and folders are closed to everyone but their owner, and stay so.
    temporary = path.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{_end(path.name)}")
    with _removed_if_empty(path.parent):
        try:
            _make_folder(path.parent)
            yield temporary
        except BaseException as error:  # KeyboardInterrupt too: nothing half-written stays
            full = _means_full_disk(error, path.parent)  # before the clean-up frees some
            with suppress(OSError):  # a failing clean-up must not hide the first error
                _remove(temporary)
            if full:
                raise _full(path) from error
            raise


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove what the body made of the folder and its parents, where it is empty afterwards."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


def _end(name: str) -> str:
    """Return the end of a file's name, so that more fits before it: the longest has 255 bytes."""
    return os.fsdecode(os.fsencode(name)[-200:])


def _make_folder(folder: Path, name: Path | None = None) -> None:
    """Make a folder, which is spoken of as `name`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise
        what = f"The folder {name or folder} cannot be made ({error.strerror})"
        raise UserError(f"{what}: name another one.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"The folder {folder} is not writable: name another one.")


def _require_free(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a link, which is not replaced: name the folder itself.")
    if os.path.ismount(path):
        raise UserError(f"{path} is a mount point, which is not replaced: name a folder in it.")
    if path.is_dir():
        if path == Path.cwd():  # replacing it would leave the shell in a folder that is gone
            raise UserError(f"{path} is the current folder: name a new folder in it.")
        if any(path.iterdir()):
            raise UserError(f"The folder {path} exists and is not empty: name a new one.")
    elif path.exists():
        raise UserError(f"{path} is a file: name a new folder.")


def _flush(file: Path) -> None:
    """Force the content to the disk, so that a crash after the rename cannot leave it empty."""
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def _means_full_disk(error: BaseException, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # safetensors and pyarrow report it in the system's words, torch.save in its own.
    words = (*map(os.strerror, _FULL), "unexpected pos")
    if isinstance(error, Exception) and any(word in str(error) for word in words):
        return True
    # numpy ("100 requested and 7 written") does not say: look.
    look = isinstance(error, OSError | RuntimeError) and folder.is_dir()
    return look and shutil.disk_usage(folder).free < _NEARLY_FULL
