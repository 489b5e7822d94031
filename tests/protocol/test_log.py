"""A log line says what happened and to whom: to people in words, to machines as one JSON object."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from protocol import log
from protocol.errors import RecipeError
from protocol.log import LOG

FIELDS = {"role": "rollout/3", "ticket": "000003-0007"}


@pytest.fixture(params=["", "json"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either form of lines, set up."""
    monkeypatch.setenv(log.VARIABLE, request.param)
    log.set_up("1f0c", "driver")
    return str(request.param)


def test_a_message_is_told_to_people_as_it_is_and_to_machines_with_its_run_and_role(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    LOG.info("ein Bild: 100 %d\nand more")
    told = capsys.readouterr().out
    if form == "json":
        assert told.count("\n") == 1
        line = json.loads(told)
        assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
        assert line == {"level": "info", "run": "1f0c", "role": "driver", "message": "ein Bild: 100 %d\nand more"}
    else:
        assert told == "ein Bild: 100 %d\nand more\n"


def test_a_warning_names_whom_and_what_ticket_it_is_about(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    LOG.warning("lost", extra=FIELDS)
    LOG.warning("gave no answer", extra={"role": "weight store", "ticket": None})
    first, second = capsys.readouterr().out.splitlines()
    if form == "json":
        assert json.loads(first).items() >= {**FIELDS, "level": "warning", "message": "lost", "run": "1f0c"}.items()
        assert "ticket" not in json.loads(second)
    else:
        assert [first, second] == ["rollout/3, ticket 000003-0007: lost", "weight store: gave no answer"]


def test_a_process_that_is_set_up_again_tells_each_line_once(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("1f0c", "driver")
    LOG.info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_processes_elsewhere_log_as_this_one_does(form: str) -> None:
    assert log.environment() == ({log.VARIABLE: "json"} if form else {})


def test_another_form_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.VARIABLE, "xml")
    with pytest.raises(RecipeError, match=r"SFUMATO_LOG.*'xml'.*json"):
        log.set_up("1f0c", "driver")
