"""The display: a line a round, told once, with a trend and a time that follow from the rows alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.attempt import Status
from cluster.progress import (
    BARS,
    TREND_LENGTH,
    History,
    PlainLines,
    busy,
    display,
    duration,
    eta_s,
    panel,
    round_line,
    trend,
)
from protocol import log
from protocol.recipe import Recipe

RECIPE = Recipe.model_validate(
    {
        "rounds": 10,
        "prompts": {"train": "unused"},
        "batch": {"num_groups": 4, "group_size": 4},
        "rewards": [{"name": "jpeg_compressibility"}],
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
    }
)
BUSY = {
    "learner/0": {"busy_s": 3.0, "alive_s": 4.0},
    "learner/1": {"busy_s": 1.0, "alive_s": 4.0},
    "rollout/0": {"busy_s": 0.0, "alive_s": 0.0},
}


def row(round_: int, *, learner_s: float = 1.0, wait_s: float = 0.5) -> dict[str, Any]:
    times = {"time/learner_s": learner_s, "time/wait_s": wait_s}
    return {"round": round_, "reward/mean": float(round_), "loss": 0.1, "clip_fraction": 0.25, **times}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_a_trend_has_a_bar_for_each_of_the_last_values(values: list[float]) -> None:
    bars, shown = trend(values), values[-TREND_LENGTH:]
    assert len(bars) == len(shown)
    heights = [BARS.index(bar) for bar in bars]
    order = sorted(range(len(shown)), key=shown.__getitem__)
    assert [heights[i] for i in order] == sorted(heights)


def test_the_lowest_and_the_highest_value_have_the_lowest_and_the_highest_bar() -> None:
    assert trend([0, 7, 3.5, 7, 0]) in ("▁█▅█▁", "▁█▄█▁")
    assert trend([2.0, 2.0]) == "▁▁"


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "00:00"), (59.9, "00:59"), (61, "01:01"), (3599, "59:59"), (3600, "01:00:00")]
)
def test_a_duration_is_told_in_minutes_or_hours(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_duration_of_days_does_not_lose_them() -> None:
    assert duration(25 * 3600 + 61) == "25:01:01"


def test_the_time_left_is_that_of_the_last_rounds_times_those_to_come() -> None:
    rows = [row(0, learner_s=100.0), *(row(round_, learner_s=2.0, wait_s=1.0) for round_ in range(1, 6))]
    assert eta_s(RECIPE, rows) == pytest.approx(4 * 3.0)
    assert eta_s(RECIPE, [row(round_) for round_ in range(10)]) == 0


def test_a_share_is_averaged_over_a_roles_processes() -> None:
    assert busy(Status(progress=BUSY)) == "learner 50 %  rollout 0 %"


@pytest.fixture(autouse=True)
def lines() -> None:
    """Lines as a driver writes them."""
    log.set_up("1f0c", "driver")


def write(path: Path, *rounds: int, torn: str = "") -> None:
    path.write_text("".join(json.dumps(row(round_)) + "\n" for round_ in rounds) + torn)


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    assert history.read() == []
    write(tmp_path / "metrics.jsonl", 0, 1, torn='{"round": 2')
    assert [line["round"] for line in history.read()] == [0, 1]


def test_each_round_and_each_phase_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = PlainLines(RECIPE, History(path))
    for phase, rounds in (("starting", ()), ("training", ()), ("training", (0,)), ("training", (0, 1, 2))):
        write(path, *rounds)
        lines.show(Status(phase=phase, progress=BUSY))
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["starting", "training"]
    assert [line.split("  ")[0] for line in told[2:]] == ["round 1/10", "round 2/10", "round 3/10"]


def test_a_resumed_run_tells_only_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    lines = PlainLines(RECIPE, History(path))
    for rounds in ((0, 1, 2), (0, 1), (0, 1, 2), (0, 1, 2, 3)):
        write(path, *rounds)
        lines.show(Status(phase=""))
    told = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["round 3/10", "round 4/10"]


def test_lines_for_machines_say_whose_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(log.VARIABLE, "json")
    log.set_up("1f0c", "driver")
    with display(RECIPE, tmp_path) as show:
        show(Status(phase="training"))
        write(tmp_path / "metrics.jsonl", 0)
        show(Status(phase="training", progress=BUSY))
    phase, round_ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (phase["run"], phase["role"], phase["message"]) == ("1f0c", "driver", "training")
    assert (round_["run"], round_["role"], round_["round"]) == ("1f0c", "learner", 0)
    assert round_["message"].startswith("round 1/10")


def told_of(*rows: dict[str, Any]) -> tuple[str, str]:
    """The line of the last row, and the live display."""
    status, shown = Status(phase="training", progress=BUSY), io.StringIO()
    Console(file=shown, width=100).print(panel(RECIPE, list(rows), status))
    return round_line(RECIPE, list(rows), status), shown.getvalue()


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def test_a_run_without_rewards_or_a_window_shows_its_loss_alone() -> None:
    for told in told_of(*(without(row(round_), "reward/mean", "clip_fraction") for round_ in range(3))):
        assert "loss" in told
        assert "reward" not in told
        assert "clip" not in told


def test_the_share_of_pairs_won_is_shown_where_there_are_pairs() -> None:
    for told in told_of({**row(0), "pairs/accuracy": 0.75}):
        assert "pairs won" in told
        assert "0.75" in told


def test_a_round_that_happened_to_have_nothing_scored_does_not_take_the_reward_off_the_display() -> None:
    line, shown = told_of(row(0), row(7), without(row(2), "reward/mean"))
    assert "reward" not in line
    assert "reward 7.000" in " ".join(shown.split())


@pytest.mark.parametrize("num_rows", [0, 1, 10])
def test_the_live_display_shows_round_reward_shares_queue_and_time(num_rows: int) -> None:
    status = Status(phase="training", attempt=1, restarts=2, queue="3 waiting, 1 claimed", progress=BUSY)
    console = Console(file=io.StringIO(), width=100)
    console.print(panel(RECIPE, [row(round_) for round_ in range(num_rows)], status))
    shown = console.file.getvalue()
    for words in ("training, attempt 2, 2 restarts", f"{num_rows} of 10", "learner 50 %", "3 waiting, 1 claimed"):
        assert words in shown
    assert ("ETA" in shown) == (num_rows > 0)
