"""What docs/scale.md says is what bench/scale.json holds, to the last digit that is written."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from bench.scale import LAYOUTS, RESULTS

PAGE = Path("docs/scale.md").read_text()
HELD: dict[str, Any] = json.loads(RESULTS.read_text())
POINTS = HELD["measured"]["points"]
CHECKED = HELD["validation"]["points"]
PARTS = {"servers": "server", "ranks": "rank", None: "nothing"}


def table(first_cell: str) -> list[list[str]]:
    """Returns the cells of a table's rows, without its head."""
    rows = PAGE[PAGE.index(f"| {first_cell} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def agrees(written: str, value: float) -> bool:
    """True if a number is written as the value is, rounded to the digits that are there."""
    number = Decimal(written.removesuffix(" s").replace(",", ""))
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return abs(float(number) - value) <= 0.5001 * 10.0**exponent


def said(pattern: str) -> tuple[str, ...]:
    """Returns the numbers of a sentence, however its lines are broken."""
    found = re.search(pattern, " ".join(PAGE.split()))
    assert found, pattern
    return found.groups()


def worst(*, fewest: int, most: int, computes: tuple[bool, ...] = (False, True)) -> float:
    """Returns the largest error of points with so many actors, in percent; the point that was fitted is not one."""
    points = [p for p in CHECKED[1:] if fewest <= p["actors"] <= most and bool(p["compute_s"]) in computes]
    return max(abs(point["error"]) * 100 for point in points)


def test_the_table_of_what_was_measured_is_that_of_the_file() -> None:
    rows = table("actors")
    assert len(rows) * 2 == len(POINTS) == len(CHECKED)
    for row, idle, paced, measured in zip(rows, CHECKED[::2], CHECKED[1::2], POINTS[::2], strict=True):
        keys = ("measured_groups_per_s", "simulated_groups_per_s")
        values = [idle["actors"], *(point[key] for point in (idle, paced) for key in keys), measured["broadcast_s"]]
        assert all(agrees(*pair) for pair in zip(row, values, strict=True)), (row, values)


def test_the_errors_that_the_page_owns_up_to_are_those_of_the_file() -> None:
    num_points, median, largest = said(r"Over these (\d+) the median error is (\d+) % and the largest (\d+) %")
    assert int(num_points) == len(CHECKED) - 1
    assert agrees(median, HELD["validation"]["median_error"] * 100)
    assert agrees(largest, HELD["validation"]["max_error"] * 100)
    assert agrees(*said(r"compete for the cores: (\d+)\)"), HELD["validation"]["others"])
    up_to_16, *more = said(
        r"off by at most (\d+) %; with 32 it is (\d+) % and (\d+) %.* with 64 it is (\d+) % and (\d+) %"
    )
    assert agrees(up_to_16, worst(fewest=1, most=16))
    cases = [(count, computes) for count in (32, 64) for computes in (False, True)]
    for number, (count, computes) in zip(more, cases, strict=True):
        assert agrees(number, worst(fewest=count, most=count, computes=(computes,)))


def test_cpu_times_and_cores_are_those_of_the_file() -> None:
    others = [point["cores_of_others"] for point in POINTS]
    average, most = said(r"\(([\d.]+) on average, ([\d.]+) at most\)")
    assert agrees(average, mean(others))
    assert agrees(most, max(others))
    at_most, alone = said(r"the workers spend ([\d.]+) s of CPU time on it instead of ([\d.]+) s")
    assert agrees(at_most, POINTS[-2]["workers_s"])
    assert agrees(alone, POINTS[0]["workers_s"])
    extra = POINTS[0]["workers_s"]
    idle_ms = [
        (point["workers_s"] - extra) * point["groups_per_s"] / point["actors"] * 1000
        for point in POINTS
        if point["actors"] >= 8
    ]
    least, largest = said(r"each uses (\d+) to (\d+) ms more")
    assert agrees(least, min(idle_ms))
    assert agrees(largest, max(idle_ms))


def test_the_table_of_layouts_is_that_of_the_file() -> None:
    rows = table("servers and intake ranks")
    assert [row[0] for row in rows] == [f"{servers} and {ranks}" for servers, ranks in LAYOUTS.values()]
    for row, layout in zip(rows, LAYOUTS, strict=True):
        for cell, model in zip(row[1:3], ("SD 1.5", "SDXL"), strict=True):
            found = HELD["simulated"][model]["layouts"][layout]
            assert agrees(cell, found["keeps_up_to"])
            assert PARTS[found["first_bottleneck"]] in row[3]


@pytest.mark.parametrize(("gigabits", "times"), [(25, "ten"), (10, "four")])
def test_a_servers_thread_is_busy_so_many_times_as_long_as_a_card(gigabits: int, times: str) -> None:
    assert re.search(rf"about {times} times as long as .*{gigabits}", " ".join(PAGE.split()))
    card_s = HELD["demand"]["group_bytes"] / (gigabits / 8 * 1e9)
    assert round(HELD["demand"]["server_s"] / card_s) == {"ten": 10, "four": 4}[times]


def test_what_is_said_of_the_broadcast_holds() -> None:
    firsts = said(r"more than one from (\d+) actors on with SD 1.5, from (\d+) with SDXL")
    for model, first in zip(("SD 1.5", "SDXL"), firsts, strict=True):
        told = HELD["simulated"][model]["broadcast"]
        assert next(size for size, (_, slow) in told["full"].items() if slow > 1) == first
        assert told["full"]["10000"] == [pytest.approx(0.5, abs=0.1), pytest.approx(50, abs=5)]
        assert told["LoRA"]["10000"][1] < 0.5
