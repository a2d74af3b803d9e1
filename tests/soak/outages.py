"""Outages of the database, under load: what is done once in the course of a soak, and for how long."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.db import connection, connections

from tests import wire
from tests.soak.course import Course, end_sessions
from tests.soak.signs import FOLDER
from tests.testapp.models import Task

Outage = Callable[[Course, float], None]

#: Seconds under load before it, and after it.
BEFORE, AFTER = 1.0, 2.0


def each_once(names: list[str], seconds: float) -> Callable[[Course], None]:
    def harm(course: Course) -> None:
        for name in names:
            once(name, seconds)(course)

    return harm


def once(name: str, seconds: float) -> Callable[[Course], None]:
    """Return what does an outage of these seconds, and says how soon the workers have gone on."""

    def harm(course: Course) -> None:
        course.pause_until(lambda: count_finished() > 20)
        course.pause(BEFORE)
        course.done[name] += 1
        course.say(f"{name}, for {seconds:g} s")
        OUTAGES[name](course, seconds)
        over, before = time.monotonic(), course.patiently(count_finished)
        course.pause_until(lambda: course.patiently(count_finished) > before)
        course.say(f"over; the next tasks were finished {time.monotonic() - over:.1f} s after that")
        course.pause(AFTER)
        if name in TOLD_ONCE:
            check_that_it_is_told_once(course)

    return harm


def check_that_it_is_told_once(course: Course) -> None:
    for worker in course.workers:
        told = [worker.output.count(text) for text in ("does not answer, trying again", "answers again")]
        if told != [1, 1]:
            course.wrong.append(f"Worker {worker.pid} has told of the outage, and its end, {told} times.")


def count_finished() -> int:
    return Task.objects.filter(status__state="finished").count()


def stop(course: Course, seconds: float) -> None:
    _away(course, seconds, at_once=False)


def crash(course: Course, seconds: float) -> None:
    _away(course, seconds, at_once=True)


def _away(course: Course, seconds: float, at_once: bool) -> None:
    course.server.stop(at_once)
    course.pause(seconds)
    course.server.start()


def end_all_sessions(course: Course, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        end_sessions(1.0, 0.0)
        course.pause(1.0)


def fill_disk(course: Course, seconds: float) -> None:
    course.charges_nothing = True
    course.server.fill()
    course.pause(seconds)
    course.server.free()


def mute(course: Course, seconds: float) -> None:
    _silence(course, seconds, wire.MUTE)


def lose(course: Course, seconds: float) -> None:
    _silence(course, seconds, wire.LOSE)


def cut_off(course: Course, seconds: float) -> None:
    """Who waits for an answer learns from its own system that none comes."""
    _silence(course, seconds, wire.DOWN)


def cut_one_off(course: Course, seconds: float) -> None:
    """The others take its tasks when their leases have run out; what it brings of these is dropped."""
    worker, folder = course.workers[0], Path(os.environ[FOLDER])
    course.away.update(worker.members())
    wire.set_mode(folder, wire.DOWN, worker.pid)
    course.pause(seconds)
    wire.set_mode(folder, wire.OPEN, worker.pid)


def _silence(course: Course, seconds: float, mode: str) -> None:
    folder = Path(os.environ[FOLDER])
    wire.set_mode(folder, mode)
    course.pause(seconds)
    wire.set_mode(folder, wire.OPEN)


def behind_wires() -> dict[str, Any]:
    """Return how workers are started that reach the database through a wire each."""
    server = connection.settings_dict
    path = f"{server['HOST']}/.s.PGSQL.5432"
    reached = {"HOST": wire.HOST, "PORT": wire.PORT, "OPTIONS": wire.LIMITS}
    return {
        "launcher": [*wire.LAUNCHER, sys.executable, "-m", "tests.wire", path, os.environ[FOLDER]],
        "databases": {alias: connections[alias].settings_dict | reached for alias in connections},
    }


OUTAGES: dict[str, Outage] = {
    "the server is stopped": stop,
    "the server crashes": crash,
    "all sessions are ended each second": end_all_sessions,
    "the disk is full": fill_disk,
    "the address is silent, and speaks again": mute,
    "the address is silent, and its connections are lost": lose,
    "the network is silent": cut_off,
    "the network is silent for one worker of two": cut_one_off,
}
#: Those of which each worker tells when they begin and when they are over.
TOLD_ONCE = [name for name, outage in OUTAGES.items() if outage in (stop, crash, cut_off)]
#: Those in which workers reach the database through a wire.
SILENT = [name for name, outage in OUTAGES.items() if outage in (mute, lose, cut_off, cut_one_off)]
