"""A small disk, which a test can fill: a file system in memory that this process alone has mounted.

It needs a namespace of mounts, which `unshare` makes, also for who is not root: see `enter`. Nobody else sees
the disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What `unshare` is told where it is not root who asks.
USER = [] if os.name == "posix" and os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
_LAUNCHER = ["unshare", *USER, "--mount", "--propagation", "private"]
_IS_ENTERED = "MODELQUEUE_TEST_HAS_DISKS"

_DETACH = 2
#: Seconds between two looks whether there is room again on a disk that is to be full.
_TICK = 0.005


def in_memory(room: int) -> Path | None:
    """Return the system's folder in memory if it has so many MiB of room, and programs can be run from there.

    No test cuts the power. On a disk that others use, too, all tests of a database stood still now and then.
    """
    folder = Path("/dev/shm")
    if not folder.is_dir() or os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return None
    return folder if shutil.disk_usage(folder).free >= room * 2**20 else None


def can_be_had() -> bool:
    """Say whether this system makes such a namespace."""
    if shutil.which("unshare") is None:
        return False
    return not subprocess.run([*_LAUNCHER, "true"], capture_output=True, check=False).returncode


def enter(*command: str) -> None:
    """Let this process be in such a namespace, by running its command again there, if it is in none."""
    if _IS_ENTERED not in os.environ:
        os.environ[_IS_ENTERED] = "1"
        os.execvp(_LAUNCHER[0], [*_LAUNCHER, sys.executable, *command])


class Disk:
    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"
        self._is_free = threading.Event()
        self._thread: threading.Thread | None = None

    def fill(self) -> None:
        """Leave no room on it from now on, also where somebody deletes something."""
        self._is_free.clear()
        self._fill()
        self._thread = threading.Thread(target=self._keep_full, daemon=True)
        self._thread.start()

    def free(self) -> None:
        """Make room again."""
        if self._thread is not None:
            self._is_free.set()
            self._thread.join()
            self._thread = None
            self._filler.unlink()

    def _keep_full(self) -> None:
        while not self._is_free.wait(_TICK):
            self._fill()

    def _fill(self) -> None:
        with self._filler.open("ab", buffering=0) as filler:
            for size in (2**20, 2**12):
                try:
                    while filler.write(bytes(size)):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise


@contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[Disk]:
    """Mount a disk of this size in a folder, of which it covers what is there."""
    library, path, owner = ctypes.CDLL(None, use_errno=True), os.fsencode(folder), folder.stat()
    options = f"size={mebibytes}m,mode=700".encode()
    if library.mount(b"tmpfs", path, b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), f"no disk can be mounted on {folder}")
    if USER == []:
        os.chown(folder, owner.st_uid, owner.st_gid)
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.free()
        library.umount2(path, _DETACH)
