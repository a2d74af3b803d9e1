"""The documentation is true: its code runs, and it names everything that is public, and nothing else."""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import logging
import re
import signal
import sys
import time
import types
import unittest
from typing import Any, get_args

import django
import pytest
from django.core.files.base import ContentFile
from django.core.management.base import BaseCommand
from django.db import connection, models
from django.test.utils import CaptureQueriesContext, isolate_apps, override_settings

import modelqueue
from modelqueue import State, Status, backoff, conf, findings, operations, queues, testing, verbs
from modelqueue.fields import declared_on
from modelqueue.management.commands.modelqueue import Command
from modelqueue.outcomes import Ending, Policy
from modelqueue.source import Source
from modelqueue.task_backend import apis
from modelqueue.task_backend.management.commands import import_django_tasks_db
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.options import OPTIONS
from modelqueue.testing import plugin, travel
from tests import pages
from tests.testapp.models import Task

REFERENCE = pages.DOCS / "reference"
PYTHON_PAGES = [page for page in pages.pages() if pages.blocks(page, "python", "pycon")]
#: Files of a real project, run as such elsewhere.
RUN_AS_A_PROJECT = {"docs/tutorial/index.md", "docs/howto/existing-table.md"}


def name_of(page: Any) -> str:
    return page.relative_to(pages.ROOT).as_posix()


# Code

#: Django takes the app of a model from the name of its module.
APP_OF_PAGE = "tests.testapp.page"


class _Idle(Exception):  # noqa: N818
    """An endless loop has found nothing to do."""


class Reader:
    """Does what a page says, block by block: a namespace, an app for its models, and their tables."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.names: dict[str, Any] = {
            "__name__": APP_OF_PAGE,
            "models": models,
            "modelqueue": modelqueue,
        }
        self.tables: list[type[models.Model]] = []
        self.settings = contextlib.ExitStack()

    def read(self) -> int:
        """Run all blocks, each raises where it does not do what the page says; return how many there are."""
        blocks = list(pages.blocks(self.page, "python", "pycon"))
        for block in blocks:
            if block.is_doctest:
                self.check(block)
            else:
                self.run(block)
        return len(blocks)

    def run(self, block: pages.Block) -> None:
        # As pages tell those whose Django has no tasks of its own.
        text = block.text.replace("django.tasks", apis.default().package)
        is_of_tasks = block.module is not None and block.module.endswith(".tasks")
        # A task is found by the name of its module.
        self.names["__name__"] = block.module if is_of_tasks else APP_OF_PAGE
        # Statement by statement, so that a model has its table when the next one uses it.
        for statement in ast.parse("\n" * (block.line - 1) + text, str(block.page)).body:
            code = compile(ast.Module([statement], []), str(block.page), "exec")
            with contextlib.suppress(_Idle):
                exec(code, self.names)
            self.make_tables()
        if block.module is not None:
            self.make_module(block.module)
        if block.file == "config/settings.py" and "TASKS" in self.names:
            self.settings.enter_context(override_settings(TASKS=self.names["TASKS"]))

    def check(self, block: pages.Block) -> None:
        example = doctest.DocTestParser().get_doctest(
            block.text, self.names, name_of(block.page), str(block.page), block.line - 1
        )
        output: list[str] = []
        doctest.DocTestRunner().run(example, out=output.append, clear_globs=False)
        assert not output, "".join(output)
        self.names.update(example.globs)

    def make_tables(self) -> None:
        for model in list(self.names.values()):
            if (
                isinstance(model, type)
                and issubclass(model, models.Model)
                and model.__module__ == APP_OF_PAGE
                and model not in self.tables
            ):
                with connection.schema_editor() as editor:
                    editor.create_model(model)
                self.tables.append(model)

    def make_module(self, name: str) -> None:
        """Make the names of a file importable by the files after it."""
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__dict__.update({key: value for key, value in self.names.items() if key[:2] != "__"})
        while "." in name:
            name, _, child = name.rpartition(".")
            package = sys.modules.setdefault(name, types.ModuleType(name))
            package.__path__ = []
            setattr(package, child, module)
            module = package


@contextlib.contextmanager
def reader(page: Any, monkeypatch: pytest.MonkeyPatch):
    """A reader of a page, who leaves nothing behind."""
    patient = time.sleep

    def sleep(seconds: float) -> None:
        if seconds >= 1:
            raise _Idle
        patient(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    modules = set(sys.modules)
    handlers = list(logging.getLogger("modelqueue").handlers)
    level, propagate = logging.getLogger("modelqueue").level, logging.getLogger("modelqueue").propagate
    receivers = {one: list(one.receivers) for one in SIGNALS.values()}
    declared = dict(queues._declared)
    one = Reader(page)
    with isolate_apps("tests.testapp"):
        try:
            yield one
        finally:
            one.settings.close()
            for model in reversed(one.tables):
                with connection.schema_editor() as editor:
                    editor.delete_model(model)
            for made in set(queues._declared.values()) - set(declared.values()):
                declared_on(made.field).remove(made)
            for name in set(sys.modules) - modules:
                if sys.modules[name].__spec__ is None:
                    del sys.modules[name]
            logger = logging.getLogger("modelqueue")
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
            logger.manager._clear_cache()
            queues._declared.clear()
            queues._declared.update(declared)
            for one_signal, before in receivers.items():
                one_signal.receivers = before
                one_signal.sender_receivers_cache.clear()


SIGNALS = {
    name: getattr(modelqueue, name)
    for name in ("task_claimed", "task_finished", "task_recovered", "lease_lost")
}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "page", [page for page in PYTHON_PAGES if name_of(page) not in RUN_AS_A_PROJECT], ids=name_of
)
def test_code_on_page_runs(page, monkeypatch, settings, tmp_path):
    settings.MEDIA_ROOT = tmp_path
    if name_of(page) == "docs/howto/unique.md" and not connection.features.supports_partial_indexes:
        pytest.skip("needs constraints with a condition")
    if name_of(page) == "docs/howto/bulk.md" and connection.vendor != "postgresql":
        pytest.skip("needs COPY")
    with reader(page, monkeypatch) as one:
        one.names["INSTALLED_APPS"] = []  # of the reader's project
        if name_of(page) == "docs/index.md":  # an excerpt of the README
            import hashlib

            one.names["hashlib"] = hashlib
        assert one.read() > 0
        check = CHECKS.get(name_of(page))
        if check:
            check(one.names)


def check_readme(names: dict[str, Any]) -> None:
    upload = names["Upload"].objects.create(file=ContentFile(b"hello", "hello.txt"))
    assert names["hash_upload"].drain() == 1
    upload.refresh_from_db()
    assert upload.status.state == State.finished
    assert upload.sha256.startswith("2cf24dba")


def check_production(names: dict[str, Any]) -> None:
    """SIGTERM during an action of the loop: the task is finished, no other is begun, the command ends."""
    check_readme(names)
    reports = names["Report"].objects
    for _ in range(2):
        reports.create()
    act = names["render"]

    def render(report: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        act(report)

    names["render"] = render
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        names["Command"]().handle()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert Status.tally(reports, "status") == {
        "created": 0, "waiting": 1, "working": 0, "finished": 1, "canceled": 0
    }  # fmt: skip


def check_testing(names: dict[str, Any]) -> None:
    """The tests of the page pass."""
    assert run_tests_of(names) == 10
    with travel() as clock:
        names["test_two_letters_are_posted_in_two_weeks"](None, clock)


def check_django_tasks(names: dict[str, Any]) -> None:
    """The test of the page passes, in a project whose tasks are in one database."""
    backends = names["TASKS"]
    with override_settings(TASKS={"default": backends["default"]}):
        assert run_tests_of(names) == 1


def run_tests_of(names: dict[str, Any]) -> int:
    """Run the tests of a page; return how many there are."""
    classes = [one for one in names.values() if isinstance(one, type) and issubclass(one, unittest.TestCase)]
    suite = unittest.TestSuite(
        unittest.defaultTestLoader.loadTestsFromTestCase(one)
        for one in classes
        if one.__module__ == names["__name__"]
    )
    result = unittest.TestResult()
    suite.run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    return result.testsRun


def check_bulk(names: dict[str, Any]) -> None:
    """All rows of the page are waiting: 5,000 and 10 by bulk_create, one by SELECT, 5,000 by COPY."""
    mails = names["Mail"].objects
    assert Status.tally(mails, "status") == {
        "created": 0, "waiting": 10_011, "working": 0, "finished": 0, "canceled": 0
    }  # fmt: skip
    first = verbs.claim(Source.of(mails, "status"), 10)
    assert {claim.task.recipient[1:] for claim in first} == {"@example.org"}


def check_claims(names: dict[str, Any]) -> None:
    """The SQL on the page is what is sent."""
    if django.VERSION[:2] != (5, 2):  # others name and order the same columns in other words
        return
    upload = names["Upload"]
    source = Source.of(upload.objects, "status")

    def hold() -> None:
        modelqueue.run(upload.objects, "status", lambda upload: None, atomic=True)

    def claimed(fields: tuple[str, ...] = ()) -> list[Any]:
        return verbs.claim(Source.of(upload.objects.only(*fields) if fields else upload.objects, "status"))

    def renew() -> None:
        verbs.renew(source, {7: {upload.objects.get().status}})

    def recover() -> None:
        verbs.recover(source, Policy(timeout=modelqueue.ZERO_SECS))

    shown = {
        "sqlite": [("SQLite", "waiting", claimed)],
        "mysql": [("MariaDB and MySQL", "waiting", claimed)],
        "postgresql": [
            ("PostgreSQL", "waiting", claimed),
            ("PostgreSQL", "waiting", lambda: claimed(("name",))),
            ("The portable way", "waiting", claimed),
            ("The outcome", "waiting", lambda: modelqueue.run(upload.objects, "status", lambda upload: None)),
            ("The outcome", "waiting", hold),
            ("Recovery", "working", recover),
            ("Renewal", "working", renew),
        ],
    }
    statements = sql_by_heading(pages.DOCS / "explanation/claims.md")
    for heading, state, work in shown[connection.vendor]:
        upload.objects.all().delete()
        upload.objects.create(pk=7, name="a", status=Status.combine(state, 5, 0))
        way = "portable" if heading == "The portable way" else "auto"
        options = {"ENGINE": way, "PREPARED_STATEMENTS": False}
        with override_settings(MODELQUEUE=options), CaptureQueriesContext(connection) as queries:
            work()
        sent = "; ".join(as_shown(query["sql"]) for query in queries.captured_queries)
        assert re.search(statements[heading].pop(0), sent), sent


def sql_by_heading(page: Any) -> dict[str, list[str]]:
    """Return each block of SQL, by the heading above it, as a pattern in which ``...`` is anything."""
    found: dict[str, list[str]] = {}
    for section in page.read_text().split("\n## ")[1:]:
        found[section.splitlines()[0]] = [
            re.escape(as_shown(text)).replace(r"\.\.\.", ".*")
            for text in re.findall(r"^```sql\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        ]
    return found


def as_shown(sql: str) -> str:
    """Leave out what differs from time to time, and white space."""
    sql = re.sub(r"\b\d{19}\b", "N", sql.replace("testapp_upload", "uploads_upload"))
    return re.sub(r"(?<=\() | (?=\))", "", " ".join(sql.split()))


CHECKS = {
    "README.md": check_readme,
    "docs/index.md": check_readme,
    "docs/introduction.md": check_readme,
    "docs/explanation/claims.md": check_claims,
    "docs/howto/bulk.md": check_bulk,
    "docs/howto/django-tasks.md": check_django_tasks,
    "docs/howto/production.md": check_production,
    "docs/howto/testing.md": check_testing,
}


@pytest.mark.django_db
def test_number_of_now_is_what_a_database_is_said_to_make_of_it():
    text = (pages.DOCS / "howto/bulk.md").read_text()
    rows = {row[0]: row[1].strip("`") for row in table_after(text, "| database | SQL |")}
    names = {"postgresql": "PostgreSQL", "mysql": "MariaDB, MySQL", "sqlite": "SQLite"}
    with connection.cursor() as cursor:
        before = Status.waiting()
        cursor.execute(f"SELECT {rows[names[connection.vendor]]}")
        made = Status(cursor.fetchone()[0])
        after = Status.waiting()
    assert before - 10 <= made <= after + 10


def test_every_block_of_code_is_run_somewhere():
    languages = {block.language for page in pages.pages() for block in pages.blocks(page)}
    assert languages <= {
        "python",
        "pycon",
        "console",
        "text",
        "sql",
        "ini",
        "yaml",
        "eval-rst",
        "toctree",
        "glossary",
        "include",
    }


@pytest.mark.vendor("postgresql")
@pytest.mark.django_db
def test_queue_is_added_to_a_table_with_rows(settings):
    from benchmarks.measures.existing import go_through

    server = connection.settings_dict
    results = go_through({key: server[key] for key in ("ENGINE", "HOST", "USER")}, rows=6000)
    assert len(results) == 8, results


def test_each_measure_of_the_benchmarks_has_its_row():
    from benchmarks.__main__ import MEASURES

    page = (pages.DOCS / "reference" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert rows == list(MEASURES)


def test_package_docstring_runs_without_apps():
    import subprocess

    code = "import doctest, modelqueue; print(*doctest.testmod(modelqueue))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, check=True, cwd=pages.ROOT, capture_output=True, text=True)
    failed, attempted = map(int, done.stdout.split()[-2:])
    assert (failed, attempted > 0) == (0, True), done.stdout


def test_commands_of_the_worker_have_options_that_exist():
    parser = Command().create_parser("manage.py", "modelqueue")
    found = 0
    for page in pages.pages():
        for block in pages.blocks(page, "console", "ini", "yaml"):
            plain = re.sub(r'[\[\],"]', "", block.text)
            for arguments in re.findall(r"manage\.py modelqueue (worker.*)", plain):
                parser.parse_args(arguments.split())  # raises SystemExit
                found += 1
    assert found > 5


# The reference


def reference() -> str:
    return "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md")))


def entries() -> set[str]:
    directive = r"^ *\.\. (?:auto(?:function|class|exception)|py:data):: modelqueue\.([\w.]+)(?:\(\))?$"
    return set(re.findall(directive, reference(), re.MULTILINE))


def test_reference_names_every_public_name_and_no_other():
    public = {name for name in modelqueue.__all__ if name != "backoff"}
    public |= {f"backoff.{name}" for name in backoff.__all__}
    public |= {f"testing.{name}" for name in testing.__all__}
    public |= {f"operations.{name}" for name in operations.__all__}
    public |= {"__title__", "__version__"}
    assert entries() == public


@pytest.mark.parametrize("cls", [State, Status])
def test_reference_names_every_attribute_of(cls):
    text = (REFERENCE / "status.md").read_text()
    start = text.index(f"autoclass:: modelqueue.{cls.__name__}\n")
    own = re.split(r"\n(?=\.\. |```)", text[start:])[0]
    named = re.findall(r"\.\. (?:py:attribute|automethod|autoproperty):: (\w+)", own)
    public = {name for name in {**vars(cls), **cls.__annotations__} if not name.startswith("_")}
    assert set(named) == public
    assert len(named) == len(set(named))


def test_everything_public_has_a_docstring():
    for name in entries():
        value: Any = modelqueue
        for part in name.split("."):
            value = getattr(value, part)
        if getattr(value, "__module__", "").startswith("modelqueue."):
            assert inspect.getdoc(value), name
    for cls in (State, Status):
        for name, member in vars(cls).items():
            if not name.startswith("_") and (callable(member) or isinstance(member, (property, classmethod))):
                assert inspect.getdoc(getattr(cls, name)), name


def test_reference_names_each_fixture_of_the_plugin():
    rows = table_after((REFERENCE / "testing.md").read_text(), "| fixture | |")
    assert [row[0] for row in rows] == [f"`{name}`" for name in plugin.__all__]


def test_each_system_check_has_its_paragraph():
    source = "".join(path.read_text() for path in (pages.ROOT / "src/modelqueue").rglob("*.py"))
    ids = set(re.findall(r'id="(modelqueue\.[EIW]\d+)"', source))
    assert ids
    paragraphs = re.findall(
        r"^## (modelqueue\.\w+)\n\n\w", (REFERENCE / "checks.md").read_text(), re.MULTILINE
    )
    assert paragraphs == sorted(ids)


def table_after(text: str, header: str) -> list[list[str]]:
    """Return the cells of each row of the table that begins with a header."""
    lines = text[text.index(header) :].splitlines()[2:]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    ]


def test_each_setting_has_its_row():
    rows = table_after((REFERENCE / "settings.md").read_text(), "| name | default | what it does |")
    shown = {name: repr(one.default).replace("'", '"') for name, one in conf.SETTINGS.items()}
    assert rows == [[f"`{name}`", f"`{shown[name]}`", one.help] for name, one in conf.SETTINGS.items()]


def sub_commands() -> dict[str, Any]:
    """Return the parser of each sub-command."""
    parser = Command().create_parser("manage.py", "modelqueue")
    (choice,) = [action for action in parser._actions if action.dest == "command"]
    return dict(choice.choices)


def list_of_sub_commands() -> list[Any]:
    parser = Command().create_parser("manage.py", "modelqueue")
    (choice,) = [action for action in parser._actions if action.dest == "command"]
    return list(choice._choices_actions)


@pytest.mark.parametrize("name", sub_commands())
def test_each_option_of_a_sub_command_is_in_the_reference(name):
    text = (REFERENCE / ("worker.md" if name == "worker" else "commands.md")).read_text()
    common = (REFERENCE / "commands.md").read_text().split("\n## ")[0]
    heading = "retry, cancel, enqueue" if name in ("retry", "cancel", "enqueue") else name
    if name != "worker":
        text = text[text.index(f"\n## {heading}\n") :].split("\n## ")[1]
    documented = set(re.findall(r"^\| `(--[\w-]+|QUEUE)", text, re.MULTILINE))
    own, of_django = set(), set()
    for action in sub_commands()[name]._actions:
        for option in action.option_strings[-2:] or [action.metavar]:
            if option.startswith("-") and not option.startswith("--"):
                continue  # the short form
            (of_django if f"`{option}`" in common and option != "--json" else own).add(option)
    assert documented == own
    assert {"--help", "--settings", "--traceback"} <= of_django


def test_each_sub_command_is_listed_in_the_reference():
    rows = table_after((REFERENCE / "commands.md").read_text(), "| command | |")
    assert [(re.findall(r"`(\w+)`", name)[0], text) for name, text in rows] == [
        (action.dest, action.help) for action in list_of_sub_commands()
    ]


def test_each_check_of_the_doctor_has_its_row():
    rows = table_after((REFERENCE / "commands.md").read_text(), "| check | question | severity |")
    assert [(name.strip("`"), question) for name, question, _ in rows] == list(findings.CHECKS.items())
    assert all(re.match("error|warning|info", severity) for _, _, severity in rows)


# The backend of Django tasks


def page_of_the_backend() -> str:
    return (REFERENCE / "task-backend.md").read_text()


def test_each_option_of_the_backend_has_its_row():
    rows = table_after(page_of_the_backend(), "| option | default | |")
    assert [row[0].strip("`") for row in rows] == list(OPTIONS)


def test_each_column_of_the_tasks_has_its_row():
    rows = table_after(page_of_the_backend(), "| column | |")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(field.name for field in QueuedTask._meta.fields)


def test_each_option_of_moving_in_has_its_row():
    text = page_of_the_backend()
    rows = table_after(text[text.index("\n## import_django_tasks_db") :], "| option | |")
    of_django = {action.dest for action in BaseCommand().create_parser("manage.py", "other")._actions}
    parser = import_django_tasks_db.Command().create_parser("manage.py", "import_django_tasks_db")
    own = [action.option_strings[0] for action in parser._actions if action.dest not in of_django]
    assert sorted(re.findall(r"--[\w-]+", row[0])[0] for row in rows) == sorted(own)


@pytest.fixture
def events(transactional_db):
    """Each signal with what its receivers get, and its log record: a queue in which everything happens."""
    sent: dict[str, dict[str, Any]] = {}
    records: dict[str, logging.LogRecord] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records[getattr(record, "event", "")] = record

    handler, logger = Handler(), logging.getLogger("modelqueue")
    receivers = {}
    for name, one in SIGNALS.items():

        def receive(name: str = name, **arguments: Any) -> None:
            sent[name] = arguments

        receivers[name] = receive
        one.connect(receive)
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        Task.objects.create(status=Status.working(0))
        modelqueue.run(Task.objects.all(), "status", lambda task: None)
        Task.objects.create()
        modelqueue.run(Task.objects.all(), "status", lambda task: Task.objects.filter(pk=task.pk).delete())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        for name, one in SIGNALS.items():
            one.disconnect(receivers[name])
    return sent, records


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_has_its_arguments_in_the_reference(name, events):
    text = (REFERENCE / "signals.md").read_text()
    common = {re.sub("`", "", row[0]) for row in table_after(text, "| argument | |")}
    own: dict[str, set[str]] = {}
    for row in table_after(text, "| signal | argument | |"):
        signal_name = row[0].strip("`") or signal_name  # noqa: F821  (an empty cell means: as above)
        own.setdefault(signal_name, set()).update(re.findall(r"\w+", row[1]))
    assert set(events[0][name]) - {"signal"} == common | own[name]


@pytest.mark.parametrize("name", SIGNALS)
def test_log_line_has_its_keys_in_the_reference(name, events):
    text = (REFERENCE / "logging.md").read_text()
    documented = {row[0].strip("`") for row in table_after(text, "| key | |")}
    plain = set(vars(logging.makeLogRecord({})))
    assert set(vars(events[1][name])) - plain - {"message"} == documented


def test_log_lines_of_the_worker_are_those_of_the_reference():
    source = [ast.parse(path.read_text()) for path in (pages.ROOT / "src/modelqueue").rglob("*.py")]
    constants = [node.value for one in source for node in ast.walk(one) if isinstance(node, ast.Constant)]
    _, _, text = (REFERENCE / "logging.md").read_text().partition("## The worker")
    for row in table_after(text, "| level | text | |"):
        for words in re.findall(r'"([^"]+)"', row[1]):
            assert any(isinstance(one, str) and words in one for one in constants), words


def test_every_outcome_is_explained():
    words = {f"`{word}`" for word in get_args(Ending)}
    table = table_after((pages.DOCS / "explanation/outcomes.md").read_text(), "| the action |")
    assert words <= {row[-1] for row in table}
    signals = (REFERENCE / "signals.md").read_text()
    assert all(f'"{word}"' in signals for word in get_args(Ending))


# Links


def anchor(heading: str) -> str:
    """The anchor that GitHub and MyST make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: Any) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", pages.pages(), ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if fragment:
            assert fragment in anchors(linked), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", pages.pages(), ids=name_of)
def test_files_of_the_tests_that_a_page_names_exist(page):
    named = set(re.findall(r"\btests/[\w/]+\.py\b", page.read_text()))
    assert named == {name for name in named if (pages.ROOT / name).exists()}


def test_every_page_is_in_the_contents():
    listed = {pages.DOCS / "index.md"}
    for page in pages.DOCS.rglob("*.md"):
        for block in re.findall(r"^```{toctree}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            names = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {page.parent / f"{name}.md" for name in names}
    assert listed == set(pages.DOCS.rglob("*.md"))
