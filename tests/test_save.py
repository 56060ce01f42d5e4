"""`ds_horovod.save`: the file is the old one or the new one, it is the file that was meant, and nothing else stays behind."""

import contextlib
import errno
import os
import resource
import signal
import stat
import threading

import pytest
import torch

import ds_horovod
from ds_horovod import files


@pytest.fixture(params=["unnamed", "named"])
def kind(request, monkeypatch, tmp_path):
    """Of temporary file: on file systems that have unnamed ones, and on others."""
    if request.param == "named":
        monkeypatch.setattr(files, "_create_unnamed", lambda folder, mode: None)
    else:
        _require_unnamed(tmp_path)
    return request.param


def _require_unnamed(folder):
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"the file system of {folder} has no unnamed files: {error}")


def load(path):
    return torch.load(path, weights_only=True)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def end_of_a_child(work):
    """What `os.waitpid` says of a forked process that does it: minus a signal, or 0, or 1 for an exception."""
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Kill:
    """Ends the process that saves it, in the middle of writing."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        os.kill(os.getpid(), self.number)
        return str, ()


# ---- the old file or the new one


def test_save_replaces_the_file_at_once(tmp_path, kind):
    file = tmp_path / "state.pt"
    ds_horovod.save({"a": torch.ones(3)}, file)
    old = file.stat().st_ino
    ds_horovod.save({"a": torch.zeros(3)}, str(file))
    assert torch.equal(load(file)["a"], torch.zeros(3))
    assert file.stat().st_ino != old and os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_save_that_fails_leaves_the_old_file(tmp_path, kind, failure):
    class Fails:
        def __reduce__(self):
            raise failure

    file = tmp_path / "state.pt"
    for path, found in ((file, []), (tmp_path / "other.pt", ["state.pt"])):
        with pytest.raises(failure):
            ds_horovod.save([torch.ones(10**5), Fails()], path)
        assert os.listdir(tmp_path) == found
        ds_horovod.save(1, file)
    with pytest.raises(failure):
        ds_horovod.save([torch.ones(10**5), Fails()], file)
    assert load(file) == 1 and os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_save_that_is_killed_leaves_the_old_file_and_nothing_else(tmp_path, number):
    _require_unnamed(tmp_path)
    file, content = tmp_path / "state.pt", [torch.ones(10**6), Kill(number)]
    ds_horovod.save(1, file)
    assert end_of_a_child(lambda: ds_horovod.save(content, file)) == -number
    assert load(file) == 1 and os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_save_leaves_is_removed_by_the_next(tmp_path, monkeypatch, number):
    """On file systems without unnamed files."""
    file, other, content = tmp_path / "state.pt", tmp_path / "other.pt", [torch.ones(10**6), Kill(number)]
    monkeypatch.setattr(files, "_create_unnamed", lambda folder, mode: None)
    ds_horovod.save(1, file)
    assert end_of_a_child(lambda: ds_horovod.save(content, file)) == -number
    assert load(file) == 1
    (left,) = set(os.listdir(tmp_path)) - {"state.pt"}
    assert left.startswith(files.PREFIX)
    ds_horovod.save(2, other)
    assert left in os.listdir(tmp_path)  # which is no business of another file's
    ds_horovod.save(3, file)
    assert load(file) == 3 and sorted(os.listdir(tmp_path)) == ["other.pt", "state.pt"]


def test_save_between_naming_and_renaming(tmp_path, monkeypatch):
    """The complete file has a name for a moment: a failure then removes it, and the next save does if a process was killed."""
    _require_unnamed(tmp_path)
    file = tmp_path / "state.pt"
    ds_horovod.save(1, file)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", lambda *names, **folders: os.kill(os.getpid(), signal.SIGKILL))
        assert end_of_a_child(lambda: ds_horovod.save(2, file)) == -signal.SIGKILL
    assert load(file) == 1 and len(os.listdir(tmp_path)) == 2

    def refuse(*names, **folders):
        raise PermissionError(errno.EPERM, "of another owner", names[0], None, names[1])

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        with pytest.raises(PermissionError, match=r"of another owner: .*state\.pt"):
            ds_horovod.save(3, file)
    assert load(file) == 1 and os.listdir(tmp_path) == ["state.pt"]


def test_a_file_that_is_being_written_is_no_leftover(tmp_path, kind):
    file = tmp_path / "state.pt"

    class Nested:
        def __reduce__(self):
            ds_horovod.save("inner", file)
            return str, ("outer",)

    ds_horovod.save(Nested(), file)
    assert torch.load(file, weights_only=False) == "outer" and os.listdir(tmp_path) == ["state.pt"]


def test_saves_of_several_threads_are_whole(tmp_path, kind):
    file = tmp_path / "state.pt"

    def work(i):
        for _ in range(5):
            ds_horovod.save(torch.full((1000,), i), file)
            assert len(set(load(file).tolist())) == 1

    failed = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and os.listdir(tmp_path) == ["state.pt"]


def test_a_leftover_that_is_not_locked_yet_is_written_again(tmp_path, monkeypatch):
    """Another process takes a new file for a leftover in the moment before its lock."""
    monkeypatch.setattr(files, "_create_unnamed", lambda folder, mode: None)
    original, removed = files._lock, []

    def lock(file):
        if not removed:
            removed.extend(name for name in os.listdir(tmp_path) if name.startswith(files.PREFIX))
            (tmp_path / removed[0]).unlink()
        original(file)

    monkeypatch.setattr(files, "_lock", lock)
    ds_horovod.save(1, tmp_path / "state.pt")
    assert removed and load(tmp_path / "state.pt") == 1 and os.listdir(tmp_path) == ["state.pt"]


def test_a_file_that_is_too_large_is_said_to_be_so(tmp_path, kind):
    """As is a full disk: torch says "unexpected pos"."""
    file, content = tmp_path / "state.pt", torch.zeros(200_000)
    ds_horovod.save(1, file)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with pytest.raises(OSError, match=r"File too large: .*state\.pt"):
            ds_horovod.save(content, file)

    assert end_of_a_child(save) == 0
    assert load(file) == 1 and os.listdir(tmp_path) == ["state.pt"]


def test_file_and_name_are_on_disk(tmp_path, monkeypatch, kind):
    """The contents before the rename, the folder after it."""
    done, fsync, rename = [], os.fsync, os.rename

    def sync(file):
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    def renamed(*arguments, **options):
        done.append("rename")
        rename(*arguments, **options)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", renamed)
    ds_horovod.save(1, tmp_path / "state.pt")
    assert done == ["file", "rename", "folder"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, number):
    """Some file systems do not know how to. A disk that fails is something else."""
    fsync = os.fsync

    def sync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    fails = pytest.raises(OSError, match="Input/output error") if number == errno.EIO else contextlib.nullcontext()
    with fails:
        ds_horovod.save(1, tmp_path / "state.pt")
    assert os.listdir(tmp_path) == ["state.pt"]


# ---- mode and owner


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_of_a_new_file(tmp_path, kind, mask):
    before = os.umask(mask)
    try:
        ds_horovod.save(1, tmp_path / "state.pt")
        torch.save(1, tmp_path / "torch.pt")
    finally:
        os.umask(before)
    assert mode(tmp_path / "state.pt") == mode(tmp_path / "torch.pt") == 0o666 & ~mask


@pytest.mark.parametrize("before", [0o600, 0o640, 0o666, 0o4755])
def test_mode_of_a_file_that_was_there(tmp_path, kind, before):
    file = tmp_path / "state.pt"
    ds_horovod.save(1, file)
    file.chmod(before)
    ds_horovod.save(2, file)
    assert mode(file) == before and load(file) == 2


def test_what_replaces_a_private_file_is_private_while_it_is_written(tmp_path, kind):
    file, seen = tmp_path / "state.pt", []

    class Look:
        def __reduce__(self):
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(f"/proc/self/fd/{name}").startswith(str(tmp_path / "")):
                        seen.append(os.stat(f"/proc/self/fd/{name}").st_mode)
            return str, ()

    ds_horovod.save(1, file)
    file.chmod(0o600)
    ds_horovod.save(Look(), file)
    assert [stat.S_IMODE(found) for found in seen if stat.S_ISREG(found)] == [0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner_of_a_file_that_was_there(tmp_path, kind):
    file = tmp_path / "state.pt"
    ds_horovod.save(1, file)
    os.chown(file, 1000, 1001)
    file.chmod(0o4755)
    ds_horovod.save(2, file)
    assert (file.stat().st_uid, file.stat().st_gid, mode(file)) == (1000, 1001, 0o4755)


def test_a_file_that_cannot_be_given_away(tmp_path, kind, monkeypatch):
    """It is replaced by one of this process's, of the same group if possible, with this process's rights to nobody."""
    file, asked = tmp_path / "state.pt", []
    ds_horovod.save(1, file)
    file.chmod(0o6664)
    original = os.fstat

    def fstat(descriptor):
        """The old file is someone else's."""
        found = original(descriptor)
        if found.st_ino != old:
            return found
        fields = list(found)
        fields[4], fields[5] = found.st_uid + 1, found.st_gid + 1
        return os.stat_result(fields)

    def fchown(descriptor, uid, gid):
        asked.append((uid, gid))
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    old, own = file.stat().st_ino, file.stat()
    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "fchown", fchown)
    ds_horovod.save(2, file)
    assert asked == [(own.st_uid + 1, own.st_gid + 1), (-1, own.st_gid + 1)]
    assert load(file) == 2 and mode(file) == 0o664


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write read-only files")
def test_a_read_only_file_is_not_replaced(tmp_path):
    file = tmp_path / "state.pt"
    ds_horovod.save(1, file)
    file.chmod(0o444)
    for save in (torch.save, ds_horovod.save):
        with pytest.raises((PermissionError, RuntimeError), match=r"denied|cannot be opened"):
            save(2, file)
    assert load(file) == 1


# ---- which file


@pytest.mark.parametrize("there", [True, False])
def test_save_through_symbolic_links(tmp_path, kind, there):
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    target, link, second = tmp_path / "real" / "state.pt", tmp_path / "links" / "a.pt", tmp_path / "b.pt"
    link.symlink_to("../real/state.pt")
    second.symlink_to(link)
    if there:
        ds_horovod.save(1, target)
    ds_horovod.save(2, second)
    assert link.is_symlink() and second.is_symlink() and not target.is_symlink() and load(target) == 2
    assert os.listdir(tmp_path / "real") == ["state.pt"] and os.listdir(tmp_path / "links") == ["a.pt"]


def test_links_that_lead_nowhere(tmp_path):
    loop = tmp_path / "loop.pt"
    loop.symlink_to("loop.pt")
    with pytest.raises(OSError, match="symbolic links"):
        ds_horovod.save(1, loop)
    assert loop.is_symlink() and os.listdir(tmp_path) == ["loop.pt"]


def test_a_second_hard_link_keeps_the_old_content(tmp_path, kind):
    ds_horovod.save(1, tmp_path / "a.pt")
    os.link(tmp_path / "a.pt", tmp_path / "b.pt")
    ds_horovod.save(2, tmp_path / "a.pt")
    assert (load(tmp_path / "a.pt"), load(tmp_path / "b.pt")) == (2, 1)


@pytest.mark.parametrize(
    "name", ["x" * 240, "x" * 250, "x" * 255, "ä" * 127], ids=lambda name: f"{len(os.fsencode(name))} bytes"
)
def test_long_names(tmp_path, kind, name):
    for value in (1, 2):
        ds_horovod.save(value, tmp_path / name)
        assert load(tmp_path / name) == value and os.listdir(tmp_path) == [name]


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        ds_horovod.save(1, tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == []


def test_a_relative_path(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ds_horovod.save(1, "state.pt")
    assert load(tmp_path / "state.pt") == 1


def test_a_folder_in_place_of_a_file_or_none_at_all(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.pt"):
        ds_horovod.save(1, tmp_path / "folder.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ds_horovod.save(1, tmp_path / "nowhere" / "state.pt")
    assert os.listdir(tmp_path) == ["folder.pt"] and os.listdir(tmp_path / "folder.pt") == []


def test_what_is_no_regular_file_is_written_to(tmp_path):
    """As a pipe, and not /dev/null, which a mistake here would replace for the whole machine."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    ds_horovod.save(torch.ones(3), pipe)
    reader.join(timeout=30)
    (tmp_path / "copy.pt").write_bytes(got[0])
    assert stat.S_ISFIFO(pipe.stat().st_mode) and torch.equal(load(tmp_path / "copy.pt"), torch.ones(3))
