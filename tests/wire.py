"""A wire between a worker and its database, which can fall silent.

    python -m tests.wire SOCKET FOLDER COMMAND ...

runs a command in a namespace of networks of its own, see `LAUNCHER`. There the wire forwards what comes to
127.0.0.1 to the socket of a server. What it does is said by a file in that folder, see `set_mode`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.disks import USER

#: What stands before `python -m tests.wire ...`.
LAUNCHER = ["unshare", *USER, "--net"]
HOST, PORT = "127.0.0.1", 5432
#: As the documentation recommends, but shorter, as tests wait for it.
LIMITS = {
    "connect_timeout": 2,
    "tcp_user_timeout": 2000,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 2,
}

#: Forward all; forward nothing, and answer none who connects, while all connections stay open; the same, and
#: reset them at its end; let no packet through, so that none is acknowledged.
OPEN, MUTE, LOSE, DOWN = MODES = ("open", "mute", "lose", "down")

_TICK = 0.02
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def can_be_had() -> bool:
    """Say whether this system makes such a namespace."""
    if shutil.which("unshare") is None:
        return False
    return not subprocess.run([*LAUNCHER, "true"], capture_output=True, check=False).returncode


def set_mode(folder: Path, mode: str, pid: int | str = "all") -> None:
    """Let all wires of this folder do so from a moment later on, or the one of this process."""
    assert mode in MODES
    (folder / "next").write_text(mode)
    (folder / "next").replace(folder / f"mode of {pid}")


class Wire:
    def __init__(self, path: str, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._mode = OPEN
        self._forwards = asyncio.Event()
        self._clients: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, command: list[str]) -> int:
        _set_loopback(is_up=True)
        self._forwards.set()
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, PORT))
            listener.listen(100)
            listener.setblocking(False)
            self._start(self._accept(listener))
            self._start(self._obey(listener))
            process = await asyncio.create_subprocess_exec(*command)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, _send, process, number)
            return await process.wait()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _obey(self, listener: socket.socket) -> None:
        while True:
            with suppress(FileNotFoundError):
                own, all_of_us = (self._folder / f"mode of {whose}" for whose in (os.getpid(), "all"))
                mode = (own if own.exists() else all_of_us).read_text()
                if mode != self._mode:
                    self._change(mode, listener)
            await asyncio.sleep(_TICK)

    def _change(self, mode: str, listener: socket.socket) -> None:
        former, self._mode = self._mode, mode
        if DOWN in (former, mode):
            _set_loopback(is_up=mode != DOWN)
        # Where nobody accepts, the system answers one who connects, and then none any more.
        listener.listen(100 if mode == OPEN else 0)
        if former == LOSE:
            for client in self._clients:
                _reset(client)
        if mode in (MUTE, LOSE):
            self._forwards.clear()
        else:
            self._forwards.set()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await self._forwards.wait()
            client, _ = await asyncio.get_running_loop().sock_accept(listener)
            client.setblocking(False)
            # As those of a server: else it would not learn of a client that has gone in the silence.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LIMITS["tcp_user_timeout"])
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
                client.setsockopt(socket.IPPROTO_TCP, option, 1)
            self._start(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        self._clients.add(client)
        with client, socket.socket(socket.AF_UNIX) as server:
            server.setblocking(False)
            with suppress(OSError):
                await asyncio.get_running_loop().sock_connect(server, self._path)
                ways = [self._forward(client, server), self._forward(server, client)]
                tasks = [asyncio.ensure_future(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        self._clients.discard(client)

    async def _forward(self, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while data := await loop.sock_recv(source, 2**16):
                await self._forwards.wait()
                await loop.sock_sendall(target, data)
        await self._forwards.wait()  # that it has ended is not heard, either


def _set_loopback(is_up: bool) -> None:
    import fcntl  # which Windows has not

    with socket.socket() as one:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(one, _GET_FLAGS, request))[1]
        flags = flags | _UP if is_up else flags & ~_UP
        fcntl.ioctl(one, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags))


def _reset(client: socket.socket) -> None:
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.shutdown(socket.SHUT_RDWR)


def _send(process: asyncio.subprocess.Process, number: int) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(asyncio.run(Wire(sys.argv[1], Path(sys.argv[2])).run(sys.argv[3:])))
