"""Files and folders appear whole or not at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sude_lab.errors import UserError
from sude_lab.io import files
from sude_lab.io.files import (
    atomic_folder,
    atomic_write,
    lock_holder,
    locked,
    require_own,
    save_tensors,
    sole_writer,
)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_one_sentence(error: pytest.ExceptionInfo[UserError], name: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert name in message


def test_user_error_is_one_line() -> None:
    error = UserError("two\n   lines\tbecome one.")
    assert str(error) == "two lines become one."
    assert isinstance(error, ValueError)


# --- one file ------------------------------------------------------------------------------------


def test_write_appears_at_the_end_with_its_suffix(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "values.npy"
    with atomic_write(target) as temporary:
        np.save(temporary, np.arange(3))  # appends .npy to a name that lacks it
        assert temporary.parent == target.parent
        assert not target.exists()
    assert np.load(target).tolist() == [0, 1, 2]
    assert everything(target.parent) == ["values.npy"]


def test_write_is_open_to_others_as_an_ordinary_file_is(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    with atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    mode = (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "atomic").stat().st_mode == mode


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "metrics.csv"
    target.write_text("old")
    with pytest.raises(failure), atomic_write(target) as temporary:
        temporary.write_text("half of the ne")
        raise failure
    assert target.read_text() == "old"
    assert everything(tmp_path) == ["metrics.csv"]


def test_failed_write_removes_the_folders_it_made(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "kept" / "a" / "b" / "c.txt"):
        raise RuntimeError
    assert everything(tmp_path) == ["kept"]


def test_write_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error, atomic_write(tmp_path):
        pytest.fail("the body must not run")
    assert_one_sentence(error, tmp_path.name)


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error, atomic_write(tmp_path / "file" / "metrics.csv"):
        pytest.fail("the body must not run")
    assert_one_sentence(error, "file")


def test_parent_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the administrator may write everywhere
    with pytest.raises(UserError) as error, atomic_write(tmp_path / "new" / "metrics.csv"):
        pytest.fail("the body must not run")
    assert_one_sentence(error, "new")
    assert everything(tmp_path) == []


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("save", ["text", "numpy", "torch"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str) -> None:
    # numpy and torch name no reason, so the free space is looked up: pretend it agrees.
    monkeypatch.setattr(files, "_NEARLY_FULL", float("inf"))
    with pytest.raises(UserError) as error, atomic_write(tmp_path / "weights.bin") as temporary:
        temporary.symlink_to("/dev/full")
        match save:
            case "text":
                temporary.write_text("x" * 100_000)
            case "numpy":
                with temporary.open("wb") as stream:
                    np.zeros(100_000).tofile(stream)
            case "torch":
                torch.save(torch.zeros(100_000), temporary)
    assert_one_sentence(error, "weights.bin")
    assert "No space" in str(error.value)
    assert everything(tmp_path) == []


def test_full_disk_in_the_words_of_another_class(tmp_path: Path) -> None:
    class ForeignError(Exception):
        pass

    with pytest.raises(UserError, match="No space"), atomic_folder(tmp_path / "run"):
        raise ForeignError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    assert everything(tmp_path) == []


def test_other_failures_keep_their_class(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), atomic_write(tmp_path / "a"):
        raise RuntimeError("a bug")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        Path("/nowhere/at/all").read_text()


# --- a folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_folder_appears_at_the_end(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "deep" / "run"
    if exists:
        target.mkdir(parents=True)
    with atomic_folder(target) as temporary:
        (temporary / "weights").mkdir()
        (temporary / "weights" / "a.txt").write_text("whole")
        assert temporary.parent == target.parent
        assert not target.exists() or not any(target.iterdir())
    assert everything(tmp_path) == [
        "deep",
        "deep/run",
        "deep/run/weights",
        "deep/run/weights/a.txt",
    ]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failed_folder_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), atomic_folder(tmp_path / "deep" / "run") as temporary:
        (temporary / "half.txt").write_text("")
        raise failure
    assert everything(tmp_path) == []


def test_folder_refuses_one_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("kept")
    with pytest.raises(UserError) as error, atomic_folder(tmp_path / "run"):
        pytest.fail("the body must not run")
    assert_one_sentence(error, "run")
    assert (tmp_path / "run" / "precious.txt").read_text() == "kept"


def test_folder_that_another_process_filled_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not empty"), atomic_folder(tmp_path / "run") as temporary:
        (temporary / "ours.txt").write_text("")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "theirs.txt").write_text("")
    assert everything(tmp_path) == ["run", "run/theirs.txt"]


def test_folder_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError) as error, atomic_folder(tmp_path / "run"):
        pytest.fail("the body must not run")
    assert_one_sentence(error, "run")


def test_folder_refuses_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error, atomic_folder("."):
        pytest.fail("the body must not run")
    assert_one_sentence(error, tmp_path.name)


def test_folder_that_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError) as error, atomic_folder(tmp_path / "link"):
        pass
    assert_one_sentence(error, "link")
    assert everything(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "mount"])
def test_what_cannot_be_replaced_is_refused_before_the_work(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    out = tmp_path / "out"
    if kind == "mount":
        out.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    else:
        out.symlink_to(tmp_path / ("gone" if "dangling" in kind else "real"))
    with pytest.raises(UserError, match="not replaced") as error, atomic_folder(out):
        pytest.fail("the body must not run")
    assert_one_sentence(error, "out")
    assert everything(tmp_path) == ["out", "real"]


@pytest.mark.parametrize("kind", ["torch", "safetensors", "text"])
def test_a_limit_of_a_files_size_is_a_full_disk(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    values = {"x": torch.zeros(100_000)}
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        with (
            pytest.raises(UserError, match="No space"),
            atomic_write(tmp_path / "weights.pt") as path,
        ):
            if kind == "torch":
                torch.save(values, path)
            elif kind == "safetensors":
                save_file(values, path)
            else:
                path.write_text("x" * 400_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert everything(tmp_path) == []


def test_tensors_may_be_read_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    (tmp_path / "like").touch()
    save_tensors({"x": torch.arange(3)}, tmp_path / "x.safetensors", {"about": "this"})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "like").stat().st_mode
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2]


def test_nobody_elses_results_are_overwritten(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        require_own(folder, "first.csv", "run,", ("second.md",))

    check(tmp_path / "nothing there")
    mark, other = tmp_path / "first.csv", tmp_path / "second.md"
    other.write_text("mine")
    with pytest.raises(UserError, match="not from this command") as error:
        check(tmp_path)
    assert_one_sentence(error, "second.md")
    for begins in ("ru", "mine,1", ""):
        mark.write_text(begins)
        with pytest.raises(UserError, match="not from this command") as error:
            check(tmp_path)
        assert_one_sentence(error, "first.csv")
    mark.write_text("run,1")
    check(tmp_path)
    mark.unlink()
    mark.mkdir()
    with pytest.raises(UserError, match="cannot be read") as error:
        check(tmp_path)
    assert_one_sentence(error, "first.csv")


# --- one writer at a time ------------------------------------------------------------------------


@contextmanager
def elsewhere(call: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of a `with` of io.files; it is killed, not ended."""
    code = f"import sys, time; from sude_lab.io.files import *\nwith {call}:\n"
    code += "    print('held', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.lock"
    with elsewhere("locked(sys.argv[1])", path) as other:
        with locked(path, wait=False) as held:
            assert not held
        holder = lock_holder(path)
        assert holder is not None and holder.split()[1] == str(other.pid)
        waited = threading.Timer(0.2, other.kill)
        waited.start()
        with locked(path) as held:  # waits until the process is dead
            assert held and other.wait() == -signal.SIGKILL
            with locked(path, wait=False) as twice:  # nor twice in one process
                assert not twice
            assert (lock_holder(path) or "").split()[1] == str(os.getpid())
    assert lock_holder(path) is None and everything(tmp_path) == ["new"]
    path.write_text("host 1 0")  # what a killed process leaves
    assert lock_holder(path) is None


@pytest.mark.parametrize("inside", [True, False])
def test_there_is_one_writer_until_it_ends(tmp_path: Path, inside: bool) -> None:
    path = tmp_path / "deep" / "run"
    with elsewhere(f"sole_writer(sys.argv[1], inside={inside})", path) as other:
        with pytest.raises(UserError, match="writing") as error, sole_writer(path, inside=inside):
            pytest.fail("the body must not run")
        assert_one_sentence(error, "run")
        if inside:  # by whatever name
            (tmp_path / "link").symlink_to(path)
            with pytest.raises(UserError), sole_writer(tmp_path / "link", inside=True):
                pytest.fail("the body must not run")
            (tmp_path / "link").unlink()
        other.kill()
        assert other.wait() == -signal.SIGKILL
        with sole_writer(path, inside=inside):
            (tmp_path / "deep" / "beside.txt").write_text("")
    assert "beside.txt" in everything(tmp_path / "deep")
    assert not [name for name in everything(tmp_path) if "lock" in name]


@pytest.mark.parametrize("inside", [True, False])
def test_a_writer_leaves_nothing_of_its_lock(tmp_path: Path, inside: bool) -> None:
    for name in ("run", "x" * 255):
        with pytest.raises(RuntimeError), sole_writer(tmp_path / "a" / name, inside=inside):
            raise RuntimeError
        assert everything(tmp_path) == []
    (tmp_path / "kept").mkdir()
    with sole_writer(tmp_path / "kept", inside=inside):
        pass
    assert everything(tmp_path) == ["kept"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError), sole_writer(tmp_path / "file" / "run", inside=inside):
        pytest.fail("the body must not run")


def test_a_disk_that_knows_no_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(UserError, match="cannot be locked") as error, locked(tmp_path / "x.lock"):
        pytest.fail("the body must not run")
    assert_one_sentence(error, "x.lock")
