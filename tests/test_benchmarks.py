"""What the benchmarks make of their figures. That they measure is seen when they do."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.charts import CHARTS, draw
from benchmarks.figures import Table, quantile, ratio, spread
from benchmarks.report import Report

DRAIN = Table(
    "drain",
    "Drain",
    "How it was measured.",
    ("", "store", "settings", "tasks", "1 process", "2 processes"),
    [
        ("ModelQueue", "PostgreSQL", "defaults", 20_000, [30_000.0, 10_000.0, 20_000.0], [31_000.0]),
        ("one & <other>", "PostgreSQL", "its own", 500, [412.5], []),
    ],
    ("A note.",),
)
TENTHS = Table("tenths", "By tenths", "As before.", ("snapshots", "1", "2"), [("none", [2.0, 4.0], [3.0])])
REPORT = Report("Command: `python -m benchmarks`\n", [DRAIN, TENTHS], {"huey": "there is no Redis"})


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    benchmarks.main()


def test_table_shows_medians_with_their_spread():
    lines = DRAIN.markdown().splitlines()
    assert "| ModelQueue | PostgreSQL | defaults | 20,000 | 20,000 (10,000-30,000) | 31,000 |" in lines
    assert "| one & <other> | PostgreSQL | its own | 500 | 412 | not measured |" in lines
    assert lines[-1] == "A note."


@pytest.mark.parametrize(
    ("values", "shown"), [([], "not measured"), ([0.0123], "0.0123"), ([-2.0, 1.0], "-0.5 (-2 to 1)")]
)
def test_spread(values, shown):
    assert spread(values) == shown


def test_ratio_is_that_of_medians():
    assert ratio([1.0, 2.0, 9.0], [4.0]) == "0.50"
    assert ratio([1.0], []) == ""


def test_quantile_of_a_single_value_is_that():
    assert quantile([7.0], 99) == 7.0
    assert quantile([float(value) for value in range(101)], 99) == 99.0


def test_report_is_read_as_it_was_stored(tmp_path, monkeypatch, capsys):
    file = tmp_path / "report.json"
    REPORT.save(file)
    assert Report.load(file) == REPORT
    main(monkeypatch, "--from", file)
    assert capsys.readouterr().out == REPORT.markdown() + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drian"], "there is no measure drian"),
        (["--db", "oracle"], "there is no database oracle"),
        (["--only", "rq"], "there is no contender rq"),
        (["--tasks", "0"], "'0' is not a whole number"),
        (["--seconds", "-1"], "'-1' is not a number of seconds"),
        (["--save", "nowhere/file.json"], "there is no folder 'nowhere'"),
        (["--from", "nowhere.json"], "No such file"),
        (["--from", "README.md"], "README.md is not what --save writes"),
        (["drain", "--from", "nowhere.json"], "nothing is measured"),
    ],
)
def test_what_can_not_be_right_is_refused_before_anything_starts(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_charts_tell_their_figures_in_words(tmp_path):
    pytest.importorskip("matplotlib")
    images = draw(REPORT.tables, tmp_path / "charts")
    assert [image.rpartition("(")[2] for image in images] == ["charts/drain.svg)", "charts/tenths.svg)"]
    assert "ModelQueue, PostgreSQL, defaults: 1 process 20,000, 2 processes 31,000" in images[0]
    for table in REPORT.tables:
        file = tmp_path / "charts" / f"{table.name}.svg"
        title, description = list(ElementTree.parse(file).getroot())[:2]
        assert title.text == CHARTS[table.name].title
        assert description.text.startswith(f"{table.rows[0][0]}")
