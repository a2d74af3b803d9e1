"""A soak: real workers under load, on a database server of their own, while everything is done to them.

    python -m tests.soak --minutes 20
    python -m tests.soak --minutes 1 --seed 7 --fault "kill a process" --fault "stop the server for long"
    python -m tests.soak --minutes 1 --outage "the server is stopped"

The faults, their order and their pauses come from the seed, which is printed, so that a run can be repeated,
but for what a fault meets just then. With --outage there is that alone, see `tests.soak.outages`, which lasts
for these minutes; with several, one after the other. At the end all tasks have to be done, and the promises
are checked:

- each task is finished, or canceled by its own action;
- the effect of each atomic task is there exactly once, or not at all if it was canceled;
- no action ran a second time while the first one was alive, or had ended in a process that is, unless that
  was frozen, or cut off alone, or the action had ended, is atomic, and could not be committed;
- no process of any worker is left, and no worker has ended by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

import django

from tests import disks, servers
from tests.soak.signs import FOLDER, make_folders

#: The outage that needs a small disk, and how many MiB that has.
FULL, ROOM = "the disk is full", 24


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Do everything to workers.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--server", default="postgres", help="postgres, mariadb, postgres15, ...")
    parser.add_argument("--fault", action="append", help="one that is done; can be given several times")
    parser.add_argument(
        "--outage", action="append", default=[], help="what is done instead, once and for so long"
    )
    options = parser.parse_args()
    if FULL in options.outage:
        disks.enter("-m", "tests.soak", *sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it leaves nothing behind
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"Seed {seed}", flush=True)
    with (
        servers.start_guarded_server(options.server, room=ROOM if FULL in options.outage else 0) as server,
        tempfile.TemporaryDirectory(prefix="modelqueue-soak-") as folder,
    ):
        set_up(server, Path(folder), ledger="other" if FULL in options.outage else "default")
        from tests.soak.course import FAULTS, Course, at_random
        from tests.soak.outages import OUTAGES, SILENT, behind_wires, each_once

        for name in options.fault or ():
            if name not in FAULTS:
                parser.error(f"there is no fault {name!r}, only {', '.join(FAULTS)}")
        for name in options.outage:
            if name not in OUTAGES:
                parser.error(f"there is no outage {name!r}, only {', '.join(OUTAGES)}")
        seconds = 60 * options.minutes
        if options.outage:
            harm = each_once(options.outage, seconds)
        else:
            harm = at_random(options.fault or list(FAULTS), time.monotonic() + seconds)
        started = behind_wires() if set(SILENT) & set(options.outage) else {}
        wrong = Course(server, random.Random(seed), started).run(harm)
    print(f"Seed {seed}: {'all promises were kept' if not wrong else 'NOT KEPT'}", flush=True)
    for text in wrong:
        print(f"  {text}")
    return bool(wrong)


def set_up(server: servers.Server, folder: Path, ledger: str) -> None:
    """Let Django, here and in the workers, work on the databases of this server."""
    databases = servers.databases(server.connection)
    if server.connection is not servers.SQLITE and "NAME" in server.connection:
        databases["other"]["NAME"] = str(folder / "other")
    make_folders(folder)
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "MODELQUEUE_TEST_DATABASES": json.dumps(databases),
        "MODELQUEUE_TEST_APPS": "tests.soak",
        FOLDER: str(folder),
        "MODELQUEUE_SOAK_LEDGER": ledger,
    }
    django.setup()


if __name__ == "__main__":
    sys.exit(main())
