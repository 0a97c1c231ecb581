"""One training in a folder at a time."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from models.errors import InputError

BEAT_S = 10.0  # how often a training shows that it lives
PATIENCE_S = 25.0  # how long to watch for that
SETTLED_S = 2.0  # after which who wrote last has the folder, where there are no locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as on Lustre that is mounted without them


class FolderLock:
    """Holds a folder, until it is released or its process ends, however that happens.

    The lock is the operating system's, on `<folder>/.lock`, which a dead process gives back by itself. Some network
    file systems keep such locks within one host, or have none: then a holder is known by the file's time, which it
    renews.

    Raises:
      InputError: Another process has the folder; the message names it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = self._holder()
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except (BlockingIOError, PermissionError):
            os.close(self.file)
            raise self._taken(folder, holder) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locked = False  # then the file's time alone tells
        here = {"host": socket.gethostname(), "pid": os.getpid()}
        if holder and (not locked or holder.get("host") != here["host"]):
            self._watch(folder, holder)
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(here).encode(), 0)
        if not locked:
            time.sleep(SETTLED_S)
            if (holder := self._holder()) != here:  # another one came at the same time
                os.close(self.file)
                raise self._taken(folder, holder)
        self.released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Gives the folder back."""
        self.released.set()
        os.ftruncate(self.file, 0)
        os.close(self.file)

    def _holder(self) -> dict[str, Any]:
        """Who wrote the file last and did not release the folder."""
        try:
            holder = json.loads(os.pread(self.file, 1000, 0) or b"{}")
        except ValueError:  # its writer was killed while it wrote
            return {}
        return holder if isinstance(holder, dict) else {}

    def _watch(self, folder: Path, holder: dict[str, Any]) -> None:
        """Looks whether a holder on another host lives."""
        print(f"{folder}: process {holder.get('pid')} on {holder.get('host')} was here; seeing if it lives", flush=True)
        seen, began = os.fstat(self.file).st_mtime_ns, time.monotonic()
        while time.monotonic() < began + PATIENCE_S:
            time.sleep(1)
            if os.stat(self.path).st_mtime_ns != seen:
                os.close(self.file)
                raise self._taken(folder, holder)

    def _taken(self, folder: Path, holder: dict[str, Any]) -> InputError:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return InputError(f"`ckpt_dir` {folder}: {who} is training here; wait for it, or choose another folder")

    def _beat(self) -> None:
        while not self.released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a folder that vanished is noticed by who saves into it
                os.utime(self.path)
