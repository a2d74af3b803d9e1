"""The worker that begins anew when code of the project changes: a parent, and a child that is the worker.

When to stop is said to the parent alone, which passes it on by a pipe. A terminal sends Ctrl-C to both, and a
child that heard its own and that of the parent would take the latter for a second one, which ends running
actions. The pipe also tells the child that the parent is gone, so that it does not stay behind.

Django's own parent (`autoreload.restart_with_reloader`) does not do: it kills its child a quarter of a second
after Ctrl-C, and at SIGTERM at once.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sysconfig
import threading
import time
from contextlib import suppress
from pathlib import Path

from django.utils import autoreload

from modelqueue.worker.supervisor import FAULT, Supervisor
from modelqueue.worker.system import on_stop_signals

__all__ = ["is_child", "run_children", "serve_until_code_changes"]

logger = logging.getLogger("modelqueue")

#: The exit code of a child that is to be started anew; that of Django's reloader.
CODE_HAS_CHANGED = 3
#: That of one that could be started and failed later, which a change does not mend.
HAS_FAILED = 4
_STANDARD_INPUT = 0
#: Seconds between two looks of the parent at its child, and at the files of code that can not be loaded.
_TICK, _LOOK = 0.1, 0.5


def is_child() -> bool:
    """Say whether this is the process that works, and not that which starts it anew."""
    return os.environ.get(autoreload.DJANGO_AUTORELOAD_ENV) == "true"


def run_children() -> int:
    """Start the worker as a child, and anew when code has changed, until it ends; return its exit code."""
    stops = 0

    def stop() -> None:
        nonlocal stops
        stops += 1

    def run_child() -> int:
        told = 0
        environment = {**os.environ, autoreload.DJANGO_AUTORELOAD_ENV: "true"}
        arguments = autoreload.get_child_arguments()
        with subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, bufsize=0) as child:  # noqa: S603
            # Not wait(), which Ctrl-C does not interrupt on Windows.
            while (code := child.poll()) is None:
                if told < stops and child.stdin is not None:
                    told += 1
                    with suppress(OSError):  # it has ended meanwhile
                        child.stdin.write(b".")
                time.sleep(_TICK)
            return code

    restore = on_stop_signals(stop)
    try:
        has_changed = False
        while True:
            files = _files()
            code = run_child()
            if code == CODE_HAS_CHANGED:
                has_changed = True
            elif code == HAS_FAILED:
                return 1
            elif code <= 0 or not has_changed or stops:
                return code if code >= 0 else 128 - code  # as a shell says it of one that was killed
            else:  # half of a change was saved, perhaps
                logger.error("The worker can not start again. It waits until the code changes once more.")
                while not stops and _files() == files:
                    time.sleep(_LOOK)
            if stops:
                return 0
    finally:
        restore()


def _files() -> dict[Path, float]:
    """Return when each file of the code changed last.

    That is what was loaded here, before any was broken, and what lies beside that or in a folder there: a new
    module can be the broken one.
    """
    files = dict(autoreload.StatReloader().snapshot_files())
    for folder in {path.parent for path in files if not _is_installed(path)}:
        for path in (*folder.glob("*.py"), *folder.glob("*/*.py")):
            with suppress(OSError):  # it was there a moment ago
                files[path] = path.stat().st_mtime
    return files


def _is_installed(path: Path) -> bool:
    """Say whether a file is of Python or of a package, and not of the project."""
    return any(path.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def serve_until_code_changes(supervisor: Supervisor) -> int:
    """Be the child: serve until the parent says stop, or code changes; return the exit code."""
    pipe = _pipe_of_the_parent()
    has_changed = threading.Event()
    is_stopping = threading.Lock()

    def stop_in_order() -> None:
        if is_stopping.acquire(blocking=False):  # or it would count as the second request
            supervisor.stop()

    def listen() -> None:
        if os.read(pipe, 1):
            stop_in_order()
            while os.read(pipe, 1):
                supervisor.stop()
        stop_in_order()  # the parent is gone

    def watch() -> None:
        try:
            autoreload.get_reloader().run(threading.main_thread())
        except SystemExit:  # its way to say that code has changed
            has_changed.set()
            stop_in_order()

    on_stop_signals(lambda: None)
    for work in (listen, watch):
        threading.Thread(target=work, name=f"modelqueue-{work.__name__}", daemon=True).start()
    try:
        code = supervisor.run(handle_signals=False)
    except Exception:
        logger.critical("The worker has failed.", exc_info=True)
        return HAS_FAILED
    if has_changed.is_set():
        return CODE_HAS_CHANGED
    return HAS_FAILED if code == FAULT else code


def _pipe_of_the_parent() -> int:
    """Return the descriptor at which each byte is a request to stop, and keep it from what actions start.

    A program that reads its standard input, as ssh and ffmpeg do, would take the request away; one of Django
    would take itself for a child of this kind.
    """
    os.environ.pop(autoreload.DJANGO_AUTORELOAD_ENV, None)
    pipe = os.dup(_STANDARD_INPUT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _STANDARD_INPUT)
    os.close(nothing)
    return pipe
