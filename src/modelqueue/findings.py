"""What is wrong with a queue or its database: facts in, findings out.

Pure: whoever asks the database is `modelqueue.management.doctor`. Each function judges the facts of one
concern, and yields what is wrong, what that costs, and what to do about it. Facts that are None are nothing
wrong: a database has no such thing, or does not tell.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from modelqueue.durations import in_short
from modelqueue.engines.examinations import (
    Access,
    Isolation,
    OneWriter,
    Pin,
    Pooler,
    Refusal,
    Silence,
    Vacuum,
)
from modelqueue.status import Status, priority_to_datetime

__all__ = [
    "CHECKS",
    "LARGE",
    "Finding",
    "Severity",
    "clock",
    "index",
    "isolation",
    "leases",
    "listen",
    "newest_lease",
    "not_all_served",
    "one_writer",
    "pins",
    "pooler",
    "read_only",
    "silence",
    "unanswered",
    "unreadable",
    "unserved",
    "vacuum",
    "versions",
]

#: Each check and its question; whoever answers no has a finding of this name.
CHECKS = {
    "unreadable": "Can it be looked at?",
    "read-only": "Can tasks be written?",
    "index": "Is the status field in an index?",
    "plan": "Does a claim read no more of the index than the due tasks?",
    "unserved": "Are all tasks of Django in a queue that the setting TASKS has?",
    "leases": "Have all queues on one field the same lease?",
    "newest-lease": "Is no lease from the future?",
    "autovacuum": "Does autovacuum come to the table after some thousand dead rows?",
    "dead-rows": "Is the table rid of its dead rows?",
    "pinned": "Can dead rows be removed, as nobody needs to see them still?",
    "listen": "Is heard what a trigger tells of new tasks?",
    "isolation": "Are transactions READ COMMITTED?",
    "journal-mode": "Can others read while one writes?",
    "synchronous": "Does a commit wait for the disk as often as it has to, and no oftener?",
    "timeout": "Does a connection wait long enough for its turn to write?",
    "transaction-mode": "Do transactions take their turn when they begin?",
    "versions": "Are all workers of one version of modelqueue?",
    "clock": "Have this machine and the database the same time?",
    "silence": "Is a server given up that has fallen silent?",
    "pooler": "Is nobody between this machine and the database?",
}

#: From how many rows on it matters whether a claim uses an index.
LARGE = 10_000
#: How many dead rows may be left lying.
DEAD = 10_000
#: Seconds, and transactions where nobody knows those, for which a transaction may keep dead rows.
OLD, MANY = 60.0, 10_000
#: Seconds by which clocks may differ.
APART = 1.0
#: Seconds that are enough to wait for the only writer.
ENOUGH = 10.0
#: Microseconds that a dead entry of the index costs each claim that passes over it.
COST_OF_ENTRY = 0.045


class Severity(IntEnum):
    """How bad it is."""

    info = 1
    """Good to know; nothing has to be done."""
    warning = 2
    """It is slower, or less safe, than it could be."""
    error = 3
    """It does not work."""


@dataclass(frozen=True)
class Finding:
    """What is wrong."""

    check: str
    """One of `CHECKS`."""
    severity: Severity
    finding: str
    """What is wrong, with the value."""
    cost: str
    """Why that is a problem."""
    cure: str
    """What to do about it."""
    queue: str | None = None
    """None: it is about the database, and so about all of its queues."""
    database: str | None = None
    """None: nobody knows where the tasks of the queue are."""

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints of it."""
        return {
            "queue": self.queue,
            "database": self.database,
            "check": self.check,
            "severity": self.severity.name,
            "finding": self.finding,
            "cost": self.cost,
            "cure": self.cure,
        }


def unreadable(what: str, error: str, tasks: str, cure: str) -> Finding:
    return Finding(
        "unreadable",
        Severity.error,
        f"{what} can not be looked at: {error}",
        f"No worker runs {tasks}, and nothing else is known of them.",
        cure,
    )


def unanswered(check: str, error: str) -> Finding:
    return Finding(
        "unreadable",
        Severity.warning,
        f'"{CHECKS[check]}" can not be answered: {error}',
        f'What a finding "{check}" would tell is not known.',
        "Ask again when or where that does not happen: a little later, as another user, on the server that "
        "leads, past a pooler.",
    )


# A queue and its table


def index(field: str, access: Access) -> Iterator[Finding]:
    """Judge how a claim finds its task, by its status field."""
    plan = access.plan
    if plan is not None and plan.seeks_status:
        return
    rows = f"{access.size:,} rows{' or more' if access.is_large else ''}"
    if access.invalid:
        names = sorted(access.invalid)
        yield Finding(
            "index",
            Severity.warning,
            f"{', '.join(names)} on {field} is not valid: CREATE INDEX CONCURRENTLY has failed, or goes on.",
            "Each write keeps it up to date, and no claim uses it.",
            " ".join(f"REINDEX INDEX CONCURRENTLY {name};" for name in names),
        )
    elif not access.indexes:
        yield Finding(
            "index",
            Severity.warning if access.is_large else Severity.info,
            f"{field} is in no index, and its table has {rows}.",
            "Every claim and every look for abandoned tasks reads the whole table, all the time.",
            "Remove db_index=False from the field, or add a modelqueue.QueueIndex of it to Meta.indexes; "
            f"migrate. If the model has one, and all migrations are applied: {access.create}",
        )
    elif plan is not None and access.is_large:
        yield Finding(
            "plan",
            Severity.warning,
            f"A claim does not seek {field} in an index ({', '.join(sorted(access.indexes))}), and its table "
            f"has {rows}. The plan: {plan.text}",
            "Every claim reads the whole table, or a whole index, also where nothing is due.",
            f"Let the database count the rows: {access.analyze} If that does not help, let an index in "
            "Meta.indexes begin with what the queryset of the queue filters by equality, if anything, and "
            "then the field. (One with a condition is used only where the queryset has it, but for a "
            "QueueIndex.)",
        )


def read_only(facts: Refusal | None) -> Iterator[Finding]:
    """Judge whether tasks can be claimed at all."""
    if facts is not None:
        yield Finding(
            "read-only",
            Severity.error,
            f"No task in {facts.table} can be written: {facts.why}.",
            "Whoever looks at tasks sees nothing wrong, but no worker can claim one.",
            facts.cure,
        )


def unserved(tasks: str, rows: str) -> Finding:
    """Return what is wrong where a backend, or a queue of it, is gone from TASKS and left tasks behind."""
    return Finding(
        "unserved",
        Severity.warning,
        f"{tasks}.",
        "No worker with this setting runs them, nor takes them back where a worker has died.",
        "Let TASKS have that backend, queue and database again until they have run; or let another queue of "
        f"this database have them: {rows}.update(backend_name=..., queue_name=...)",
    )


def not_all_served(why: str) -> Finding:
    """Return what is wrong where there are too many queues to look at each."""
    return Finding(
        "unserved",
        Severity.info,
        f"Not all queues of Django tasks were looked at: {why}.",
        "Others may have tasks that nobody runs.",
        "Give the backend that they are of QUEUES=[]: it serves, and prunes, queues of any name.",
    )


def leases(field: str, of_queues: Mapping[str, dt.timedelta]) -> Iterator[Finding]:
    """Judge the leases of all queues on one field, by the names of these."""
    longest = max(of_queues.values())
    shorter = {name: lease for name, lease in of_queues.items() if lease < longest}
    if shorter:
        named = ", ".join(f"{name}: {lease.total_seconds():g} s" for name, lease in of_queues.items())
        yield Finding(
            "leases",
            Severity.warning,
            f"The queues on {field} have different leases ({named}).",
            f"The longest counts for all of them: after a crash also the tasks of {', '.join(shorter)} rest "
            f"for {longest.total_seconds():g} s.",
            "Give them one lease.",
        )


def newest_lease(newest: tuple[Any, Status] | None, now: dt.datetime) -> Iterator[Finding]:
    """Judge the lease that was stamped last, that of a task with this key, by the time of the database."""
    if newest is None:
        return
    pk, status = newest
    stamp = priority_to_datetime(status.priority)
    ahead = 0.0 if stamp is None else (stamp - now).total_seconds()
    if ahead > APART:
        yield Finding(
            "newest-lease",
            Severity.warning,
            f"The lease of task {pk} is from {ahead:.1f} s in the future: {status}.",
            "Some machine is ahead of the database: if it dies, its tasks rest for so much longer. (Workers "
            "go by the clock of the database, a loop of run() by that of its machine.)",
            "Synchronize the clocks of all machines that run tasks, by NTP for example.",
        )


def vacuum(facts: Vacuum | None) -> Iterator[Finding]:
    """Judge whether a table is rid of its dead rows in time."""
    if facts is None:
        return
    if facts.off is not None:
        of_server = f"ALTER SYSTEM SET {facts.off} = on; SELECT pg_reload_conf();"
        of_table = f"ALTER TABLE {facts.table} SET (autovacuum_enabled = true);"
        yield Finding(
            "autovacuum",
            Severity.warning,
            f"Autovacuum does not come to {facts.table}: {facts.off} is off.",
            "Each change of a state leaves a dead row. They stay, the table grows, claims get ever slower.",
            of_table if facts.off == "autovacuum_enabled" else of_server,
        )
    elif facts.comes_at > DEAD:
        yield Finding(
            "autovacuum",
            Severity.warning,
            f"Autovacuum comes to {facts.table} only after {facts.comes_at:,} dead rows.",
            f"Until then claims pass over them, {_cost_of(facts.comes_at)}.",
            f"ALTER TABLE {facts.table} SET (autovacuum_vacuum_scale_factor = 0, "
            "autovacuum_vacuum_threshold = 5000);",
        )
    if facts.dead >= DEAD:
        yield Finding(
            "dead-rows",
            Severity.warning,
            f"{facts.table} has {facts.dead:,} dead rows.",
            f"Claims pass over them, {_cost_of(facts.dead)}.",
            f"VACUUM {facts.table}; it holds up nobody. If that does not help, somebody may need to see them "
            'still: look for a finding "pinned".',
        )


def _cost_of(entries: int) -> str:
    return f"which takes up to {entries * COST_OF_ENTRY / 1000:.1f} ms each time"


# A database


def pins(facts: list[Pin] | None) -> Iterator[Finding]:
    """Judge who keeps dead rows from being removed."""
    for pin in facts or ():
        is_old = (pin.transactions or 0) >= MANY if pin.seconds is None else pin.seconds >= OLD
        if is_old:
            yield _pinned(pin)


def _pinned(pin: Pin) -> Finding:
    since = []
    if pin.seconds is not None:
        since.append(in_short(pin.seconds))
    if pin.transactions is not None:
        since.append(f"{pin.transactions:,} transaction{'' if pin.transactions == 1 else 's'}")
    who = f" ({pin.who})" if pin.who else ""
    query = "" if pin.query is None else f" Its last statement: {_shortened(pin.query)}"
    return Finding(
        "pinned",
        Severity.warning,
        f"The {pin.kind} {pin.name}{who} keeps dead rows for {' and '.join(since)}.{query}",
        "No row that died since then can be removed, in any table. With each task that is done a claim has "
        "more of them to pass over.",
        pin.cure,
    )


def _shortened(query: str) -> str:
    query = " ".join(query.split())
    return query if len(query) <= 100 else f"{query[:97]}..."


def isolation(facts: Isolation | None) -> Iterator[Finding]:
    """Judge whether transactions are kept apart more strictly than a queue can do with."""
    if facts is None or facts.level not in ("repeatable read", "serializable"):
        return
    if facts.locks_gaps:
        cost = (
            "A transaction of yours that changes or locks rows by a range, such as a state, keeps others "
            "from inserting tasks there until it commits. (Those of modelqueue are READ COMMITTED.)"
        )
        cure = 'Take "isolation_level" from OPTIONS of DATABASES: Django asks for READ COMMITTED then.'
    else:
        cost = (
            "A claim fails where another one was faster, and has to be tried again. In a transaction of "
            "yours, also an atomic action's, a row that has changed since it began can not be written."
        )
        cure = (
            'Take "isolation_level" from OPTIONS of DATABASES. If it is not there: '
            "ALTER ROLE CURRENT_USER SET default_transaction_isolation = 'read committed';"
        )
    yield Finding("isolation", Severity.warning, f"Transactions are {facts.level.upper()}.", cost, cure)


def one_writer(facts: OneWriter | None) -> Iterator[Finding]:
    """Judge how those who write to the only file take turns."""
    if facts is None:
        return
    if facts.journal_mode != "wal":
        yield Finding(
            "journal-mode",
            Severity.warning,
            f"The journal_mode is {facts.journal_mode}.",
            "Whoever reads keeps the workers from writing, and the other way round.",
            'Run "PRAGMA journal_mode=WAL" on the file once, which remembers it; from Django 5.1 also by '
            '"init_command" in OPTIONS.',
        )
    if not facts.synchronous:
        yield Finding(
            "synchronous",
            Severity.warning,
            "synchronous is OFF.",
            "A power cut can destroy the file.",
            'PRAGMA synchronous=NORMAL for each connection; from Django 5.1 by "init_command" in OPTIONS.',
        )
    elif facts.synchronous > 1 and facts.journal_mode == "wal":
        yield Finding(
            "synchronous",
            Severity.info,
            f"synchronous is {'FULL' if facts.synchronous == 2 else 'EXTRA'}.",
            "Each commit waits for the disk, and all others for it: a claim and an outcome of each task. In "
            "return a power cut undoes no commit.",
            "If it may undo the last ones: PRAGMA synchronous=NORMAL for each connection; from Django 5.1 by "
            '"init_command" in OPTIONS.',
        )
    if facts.timeout < ENOUGH:
        yield Finding(
            "timeout",
            Severity.warning,
            f"The timeout is {facts.timeout:g} s.",
            "One process writes at a time. With several workers some wait for longer than that, and what is "
            'not modelqueue fails with "database is locked".',
            'Let "timeout" in OPTIONS be 20. (It is added to each lease.)',
        )
    if facts.transaction_mode not in (None, "IMMEDIATE", "EXCLUSIVE"):
        yield Finding(
            "transaction-mode",
            Severity.warning,
            f"The transaction_mode is {facts.transaction_mode}.",
            'A transaction of yours that reads before it writes fails at once, with "database is locked", '
            "if a worker wrote in between.",
            'Let "transaction_mode" in OPTIONS be "IMMEDIATE".',
        )


def clock(offset: dt.timedelta | None) -> Iterator[Finding]:
    """Judge by how much the clock of the database is ahead of that of this machine; None: nobody can tell."""
    cure = "Synchronize the clocks of both, by NTP for example."
    if offset is None:
        yield Finding(
            "clock",
            Severity.info,
            "The database takes too long to answer to compare its clock with that of this machine.",
            "Workers here go by the clock of this machine.",
            cure,
        )
    elif abs(offset.total_seconds()) >= APART:
        seconds = offset.total_seconds()
        yield Finding(
            "clock",
            Severity.warning,
            f"The clock of this machine is {abs(seconds):.1f} s {'behind' if seconds > 0 else 'ahead of'} "
            "that of the database.",
            "Workers go by that of the database. But tasks that are enqueued here, and loops of run(), go by "
            "this machine: tasks begin later or sooner than they are due, and are taken back too late, or "
            "while they run.",
            cure,
        )


def versions(found: list[str] | None) -> Iterator[Finding]:
    """Judge whether a deployment has left workers of before."""
    if found and len(found) > 1:
        yield Finding(
            "versions",
            Severity.warning,
            f"The workers that are connected are of modelqueue {' and '.join(sorted(found))}.",
            "What the newer version mends goes on to happen in the older ones, on the same tasks.",
            "Unless a deployment is under way, restart the older ones: SELECT DISTINCT application_name, "
            "client_addr FROM pg_stat_activity WHERE application_name LIKE 'modelqueue worker %';",
        )


def pooler(facts: Pooler | None) -> Iterator[Finding]:
    """Tell that somebody hands out the sessions; in which way shows only if it is by the transaction."""
    if facts is None:
        return
    found = sorted(set(facts.found))
    changes = (
        f"it changes between transactions ({', '.join(map(str, found))})"
        if len(found) > 1
        else f"the database calls it {found[0]}"
    )
    yield Finding(
        "pooler",
        Severity.info,
        f"A pooler is in between: this session is {facts.told} to its user, and {changes}.",
        "Workers do without a session of their own. But if sessions are handed out by the transaction, which "
        "only a change shows for certain, SET, session locks, LISTEN and cursors of the server go astray.",
        "For what needs them connect past the pooler. DISABLE_SERVER_SIDE_CURSORS in DATABASES does without "
        "such cursors.",
    )


def silence(facts: Silence | None) -> Iterator[Finding]:
    """Judge whether a worker goes on when the machine of its server has died."""
    if facts is None or not facts.not_set:
        return
    yield Finding(
        "silence",
        Severity.warning,
        f"The connection to {facts.host} has no {', '.join(facts.not_set)}.",
        "If the server's machine dies, or a network drops what is sent, who waits for an answer waits for a "
        "quarter of an hour, or for hours, though another server has long taken its place: a worker claims "
        "nothing, and can not renew the leases of what it runs.",
        'In OPTIONS of DATABASES, for example: "connect_timeout": 5, "tcp_user_timeout": 10000 '
        '(milliseconds, on Linux), "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3.',
    )


def listen(table: str, is_heard: bool | None) -> Iterator[Finding]:
    if is_heard is False:
        yield Finding(
            "listen",
            Severity.warning,
            f"A trigger on {table} tells of new tasks, and nobody hears it.",
            "Workers find new tasks by looking for them alone, up to a second later. Each commit pays for "
            "the trigger all the same.",
            "Give the worker a database alias that goes past the pooler, or to a pool in session mode. Or "
            "drop the trigger by migrating AddNotifyTrigger backwards.",
        )
