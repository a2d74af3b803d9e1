"""Soaks, and single outages, that are short enough for the suite.

`make soak MINUTES=20` takes its time, and `make outages` has all outages, as long as they are in life.
"""

import os
import random
import shlex
import subprocess
import sys

import pytest

from tests import disks, wire
from tests.processes import ROOT, environment

SERVER = os.environ.get("MODELQUEUE_TEST_SERVER", "sqlite")


@pytest.mark.parametrize("seconds", [15] if SERVER == "postgres" else [])
def test_soak(seconds):
    soak(seconds)


#: Seconds for which a database is away, and for which each of its sessions is ended each second.
SECONDS = os.environ.get("MODELQUEUE_TEST_OUTAGE")
SECONDS_OF_ENDING = os.environ.get("MODELQUEUE_TEST_ENDING")
SHORT = 7  # longer than a lease

STOPPED, CRASHES, ENDED = "the server is stopped", "the server crashes", "all sessions are ended each second"
FULL = "the disk is full"
MUTE = "the address is silent, and speaks again"
LOST = "the address is silent, and its connections are lost"
DOWN, ONE_DOWN = "the network is silent", "the network is silent for one worker of two"

#: What each database goes through, and what of it in the suite.
OUTAGES = {
    "postgres": [STOPPED, CRASHES, ENDED, FULL, MUTE, LOST, DOWN, ONE_DOWN],
    "mariadb": [STOPPED, CRASHES, ENDED, FULL],
    "sqlite": [FULL],
}
#: (Those together that can be had in one course: to set one up takes as long.)
IN_SUITE = {"postgres": [(STOPPED, ENDED), (FULL,), (DOWN,)], "mariadb": [(CRASHES,)], "sqlite": [(FULL,)]}


def courses():
    if SECONDS is None:
        return IN_SUITE.get(SERVER, [])
    return [(outage,) for outage in OUTAGES.get(SERVER, [])]


@pytest.mark.parametrize("outages", courses(), ids=", then ".join)
def test_outage(outages):
    if FULL in outages and not disks.can_be_had():
        pytest.skip("this system lets nobody mount a disk of his own")
    if {MUTE, LOST, DOWN, ONE_DOWN} & set(outages) and not wire.can_be_had():
        pytest.skip("this system lets nobody have a network of his own")
    seconds = SECONDS_OF_ENDING if outages == (ENDED,) else SECONDS
    soak(float(seconds or SHORT), *[text for outage in outages for text in ("--outage", outage)])


def soak(seconds, *options):
    """Run one on a server of its own, and show what it says as it goes: it may hang."""
    seed = str(random.randrange(10**6))  # which repeats with the order of the tests
    options = ["--server", SERVER, "--minutes", f"{seconds / 60:.3f}", "--seed", seed, *options]
    print(f"\npython -m tests.soak {shlex.join(options)}", flush=True)
    command = [sys.executable, "-m", "tests.soak", *options]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment({}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        finally:
            process.terminate()
    assert process.returncode == 0
