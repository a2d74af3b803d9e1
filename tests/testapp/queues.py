"""The declared queues of the test app. What an errand does is said by its title."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress

import modelqueue
from modelqueue import Status
from tests.faults import ahead, clocks, halts
from tests.testapp.models import Errand, Ledger

#: The shortest, as tests wait for its end.
LEASE = dt.timedelta(seconds=float(os.environ.get("MODELQUEUE_TEST_LEASE", "3")))

TIMEOUT = dt.timedelta(seconds=float(os.environ.get("MODELQUEUE_TEST_TIMEOUT", "3600")))


@modelqueue.queue(
    Errand, "status", error_field="error", retry=2, timeout=TIMEOUT, lease=LEASE, cancel_on=LookupError
)
def do_errand(errand):
    """Do what the title says, and write it down: nothing, fail, give up, sleep for some seconds."""
    Ledger.objects.create(task=errand.pk, worker=str(os.getpid()))
    word, _, argument = errand.title.partition(" ")
    halts.act(word)
    if word == "fail":
        raise ValueError(argument)
    if word == "miss":
        raise KeyError(argument)
    if word == "sleep":
        time.sleep(float(argument))
    if word == "die":
        os.killpg(0, signal.SIGKILL) if argument else os.kill(os.getpid(), signal.SIGKILL)
    if word == "doze":  # as code that can be interrupted
        until = time.monotonic() + float(argument)
        while time.monotonic() < until:
            time.sleep(0.01)
    while word == "stay" and Errand.objects.filter(pk=errand.pk, title=word).exists():
        time.sleep(0.01)
    if word == "receive":  # what never comes
        ours, _theirs = socket.socketpair()
        ours.recv(1)
    while word == "swallow":
        with suppress(BaseException):
            time.sleep(0.01)
    if word == "linger":
        threading.Thread(target=time.sleep, args=[float(argument)], daemon=False).start()
    if word == "terminate":
        started = subprocess.Popen(["sleep", "30"])
        started.terminate()
        word = f"terminated by {-started.wait()}"
    if word == "review":
        errand.review_status = Status.waiting()
    errand.log = [*errand.log, word or "done"]


@modelqueue.queue(Errand, "review_status", slots=200, lease=LEASE)
async def review(errand):
    word, _, argument = errand.title.partition(" ")
    if word == "sleep":
        await asyncio.sleep(float(argument))
    if word == "read":
        await Errand.objects.acount()
        await asyncio.sleep(float(argument))
    errand.log = [*errand.log, "reviewed"]


# In a worker that a test has told to by its environment.
halts.install()
clocks.install()
ahead.install()
