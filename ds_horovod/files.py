"""`save`: a ``torch.save`` after which a file is either the old one or the new one, whole, whatever interrupts it.

The new file is written beside the old one and takes its place by a rename. Where the file system and ``/proc`` allow it (ext4,
XFS, Btrfs and tmpfs do, NFS does not), it has no name until it is complete, and the kernel frees it when the process dies.
Elsewhere, and between naming and renaming it, a process that is killed leaves a file whose name begins with `PREFIX`. The
next save of the same file removes it: a lock that dies with its process tells what is left over from what is being written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from typing import Any

import torch

PREFIX = ".ds_horovod-"
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # EBADF: the folder may be searched but not read


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Saves like ``torch.save``, and leaves either the old file or the new one, whole, whenever it is interrupted.

    Parameters
    ----------
    obj
        What ``torch.save`` takes.
    path
        The file to write. A symbolic link stays, and the file that it leads to is written.

    Raises
    ------
    OSError
        The file cannot be written, for example because the disk is full. The old file is unchanged, and nothing else is left.
        If only the folder could not be synchronized, the new file is in place, but may not survive a power failure.

    Notes
    -----
    When `save` returns, the file and its name are on disk. A file that was there keeps its mode, owner and group. A process
    that may not give files away becomes the owner, keeps the group if it is a member of it, and drops the set-user-ID and
    set-group-ID bits. Access control lists and extended attributes are not kept. A second hard link keeps the old content.
    The folder must be writable, and has to hold the old file and the new one for a while.

    A process that is killed while it writes leaves no temporary file on ext4, XFS, Btrfs or tmpfs, unless the signal
    comes between the two system calls that put the complete file into place. On file systems without unnamed files,
    such as NFS, it leaves a file named ``.ds_horovod-*``. The next call with the same path removes what was left.

    What is not a regular file, such as a named pipe or ``/dev/null``, is written to directly.
    """
    target = os.path.realpath(path)
    try:
        descriptor = os.open(target, os.O_WRONLY)  # refuses what torch.save could not write: a directory, a read-only file
    except FileNotFoundError:
        status = None
    else:
        with open(descriptor, "wb") as existing:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                torch.save(obj, existing)
                return
    folder_name, name = os.path.split(target)
    folder = _open_folder(folder_name)
    try:
        _replace(obj, folder, name, status)
        _sync_folder(folder)
    except OSError as error:
        if error.errno and (error.filename is None or str(error.filename).startswith(PREFIX)):
            raise OSError(error.errno, error.strerror, target) from error  # the user knows this name, not the temporary one
        raise
    finally:
        os.close(folder)


def _replace(obj: Any, folder: int, name: str, status: os.stat_result | None) -> None:
    """Writes a new file and renames it, with the mode and owner of the old one where there is one."""
    prefix = f"{PREFIX}{hashlib.blake2s(os.fsencode(name), digest_size=8).hexdigest()}-"  # short, however long the name is
    _remove_leftovers(folder, prefix)
    mode = 0o666 if status is None else 0o600  # less the umask; nobody else may open what replaces a private file
    temporary = prefix + secrets.token_hex(8)
    descriptor = _create_unnamed(folder, mode)
    named = descriptor is None
    try:
        with open(_create_named(folder, temporary, mode) if descriptor is None else descriptor, "wb") as file:
            _write(obj, file)
            if status is not None:
                _keep_owner_and_mode(file.fileno(), status)
            os.fsync(file.fileno())
            if not named:
                named = True
                # dst_dir_fd makes os.link call linkat, which follows the link in /proc.
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, dst_dir_fd=folder)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        if named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
        raise


def _write(obj: Any, file: Any) -> None:
    """Raises OSError where torch says RuntimeError because of one: "unexpected pos" is all that it says of a full disk."""
    try:
        torch.save(obj, file)
        file.flush()
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _keep_owner_and_mode(file: int, status: os.stat_result) -> None:
    mode, own = stat.S_IMODE(status.st_mode), os.fstat(file)
    if (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
        try:
            os.fchown(file, status.st_uid, status.st_gid)
        except OSError:  # may not be given away
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
            with contextlib.suppress(OSError):
                os.fchown(file, -1, status.st_gid)
    if stat.S_IMODE(os.fstat(file).st_mode) != mode:
        os.fchmod(file, mode)


# ---- temporary files


def _create_unnamed(folder: int, mode: int) -> int | None:
    """A locked file without a name; None where there is no such thing."""
    if not os.path.isdir("/proc/self/fd"):
        return None
    try:
        file = os.open(".", os.O_TMPFILE | os.O_WRONLY, mode, dir_fd=folder)
    except OSError:  # if the folder cannot be written at all, creating a named file says so
        return None
    _lock(file)
    return file


def _create_named(folder: int, name: str, mode: int) -> int:
    """A new, locked file."""
    while True:
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode, dir_fd=folder)
        _lock(file)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # another process has taken it for a leftover, before it was locked


def _lock(file: int) -> None:
    with contextlib.suppress(OSError):  # on a file system without locks nothing is taken for a leftover
        fcntl.flock(file, fcntl.LOCK_EX)


def _remove_leftovers(folder: int, prefix: str) -> None:
    """Removes files of processes that were killed while they saved the same file."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefix):
                _remove_unless_locked(folder, name)


def _remove_unless_locked(folder: int, name: str) -> None:
    with contextlib.suppress(OSError):
        file = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=folder)
        finally:
            os.close(file)


# ---- folders


def _open_folder(name: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # files may be made in a folder that may not be listed
        return os.open(name, os.O_PATH | os.O_DIRECTORY)


def _sync_folder(folder: int) -> None:
    """Puts the new name on disk."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
