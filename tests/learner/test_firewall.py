"""The firewall's judgement: a pure function of the looks, the same on every rank and after a resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from learner.firewall import Verdict, Watchman
from protocol.firewall import Firewall
from protocol.groups import Group
from protocol.roles import Reward

HELD_OUT = Reward(name="kind")
TRAINED = (Reward(name="size", weight=2.0), Reward(name="report", weight=0.0))
SPREAD = np.array([-1.0, 1.0])
"""Scores around a mean have standard deviation 1."""

Look = Callable[..., Verdict]


def alone(value: Any) -> list[Any]:
    return [value]


def watchman(rewards: Sequence[Reward] = TRAINED, gather: Any = alone, **settings: Any) -> Watchman:
    return Watchman(Firewall(rewards=(HELD_OUT,), **settings), rewards, gather)


@pytest.fixture
def check(make_group: Callable[..., Group]) -> Callable[..., list[Group]]:
    """Returns a check of two groups whose scores have these means."""

    def make(means: Mapping[str, float | None]) -> list[Group]:
        arrays = {
            f"reward_{label}_G": np.asarray(mean + SPREAD, np.float32)
            for label, mean in means.items()
            if mean is not None
        }
        return [dataclasses.replace(make_group(), ticket_id=f"000000-check-000{n}", arrays=arrays) for n in range(2)]

    return make


@pytest.fixture
def look(check: Any) -> Look:
    """Lets a watchman look at a version whose trained and held-out scores have these means."""

    def see(by: Watchman, version: int, size: float | None, kind: float | None) -> Verdict:
        return by.look(check({"size": size, "report": 0.0, "kind": kind}), version)

    return see


@pytest.mark.parametrize(
    ("size", "kind", "trips"),
    [
        (1.0, 4.4, True),  # climbed, fell by 0.6
        (1.0, 4.6, False),  # climbed, fell by less than the margin
        (-1.0, 0.0, False),  # fell too: not hacked but broken, which its own metrics show
        (0.0, 0.0, False),  # did not climb
        (1.0, 9.0, False),
    ],
)
def test_it_trips_where_the_trained_reward_climbs_and_a_held_out_one_falls_beyond_the_margin(
    look: Look, size: float, kind: float, trips: bool
) -> None:
    by = watchman(margin=0.5)
    assert look(by, 0, 0.0, 5.0).action == "none"
    verdict = look(by, 5, size, kind)
    assert verdict.action == ("warn" if trips else "none")
    assert verdict.metrics["firewall/tripped"] == trips
    assert by.good == (0 if trips else 5)


def test_a_reason_names_rewards_values_and_versions(look: Look) -> None:
    by = watchman()
    look(by, 0, 0.0, 5.0)
    (reason,) = look(by, 5, 1.5, 4.0).reasons
    assert "kind fell from 5 (version 0) to 4 (version 5)" in reason
    assert "the trained reward rose from 0 to 3" in reason


def test_a_fall_is_measured_from_the_best_so_far(look: Look) -> None:
    by = watchman(margin=0.5)
    for version, (size, kind) in enumerate([(0.0, 5.0), (1.0, 6.0), (2.0, 5.8)]):
        assert look(by, version, size, kind).action == "none"
    assert look(by, 3, 3.0, 5.4).action == "warn"


def test_the_margin_counts_in_spreads_of_the_first_check(check: Any) -> None:
    by = watchman(margin=0.5)
    wide = [dataclasses.replace(g, arrays={**g.arrays, "reward_kind_G": 5 + 10 * SPREAD}) for g in check({"size": 0.0})]
    by.look(wide, 0)
    assert by.look(check({"size": 1.0, "kind": 0.5}), 1).action == "none"
    assert by.look(check({"size": 1.0, "kind": -0.5}), 2).action == "warn"


def test_what_failed_to_be_scored_is_passed_over(look: Look) -> None:
    by = watchman()
    look(by, 0, 0.0, 5.0)
    assert "firewall/kind" not in look(by, 1, 1.0, None).metrics
    assert look(by, 2, None, 0.0).metrics["firewall/trained"] is None
    assert look(by, 3, 1.0, 0.0).action == "warn"


def test_a_running_normalisation_does_not_move_the_measure(look: Look) -> None:
    by = watchman([Reward(name="size", normalise={"how": "running"})])
    assert look(by, 0, 3.0, 5.0).metrics["firewall/trained"] == 0
    assert look(by, 1, 7.0, 5.0).metrics["firewall/trained"] == 4
    fixed = watchman([Reward(name="size", normalise={"how": "fixed", "mean": 1.0, "std": 2.0})])
    assert look(fixed, 0, 7.0, 5.0).metrics["firewall/trained"] == 3


def test_after_its_roll_backs_are_used_up_it_stops(look: Look) -> None:
    by = watchman(on_trip="roll_back", max_roll_backs=1)
    look(by, 0, 0.0, 5.0)
    look(by, 2, 0.5, 5.0)
    assert look(by, 4, 1.0, 0.0).action == "roll_back"
    assert by.roll_back(next_version=6) == 2
    # Rounds that were sampled before it still come, and are no reason.
    assert look(by, 5, 1.0, 0.0).action == "none"
    assert by.good == 2
    assert look(by, 6, 0.5, 5.0).action == "none"
    assert by.good == 6
    assert look(by, 8, 1.0, 0.0).action == "stop"


def test_two_ranks_judge_as_one_does(check: Any) -> None:
    one, said = watchman(), list[Any]()
    expected = []
    for version, size in enumerate((0.0, 1.0)):
        groups = check({"size": size, "kind": 5.0 - 2 * size})
        groups[1] = dataclasses.replace(groups[1], arrays={n: a + 1 for n, a in groups[1].arrays.items()})
        expected.append(one.look(groups, version))
        # What each of two ranks would say; a rank without a part of the check says nothing.
        said.append([[_said(groups[1])], [_said(groups[0])], []])
    rounds = iter(said)
    rank = watchman(gather=lambda own: next(rounds))
    assert [rank.look([], 0), rank.look([], 1)] == expected
    assert rank.state() == one.state()


def _said(group: Group) -> Any:
    return group.ticket_id, {name[len("reward_") : -len("_G")]: array for name, array in group.arrays.items()}


def test_a_resumed_watchman_remembers(look: Look) -> None:
    by = watchman()
    look(by, 0, 0.0, 5.0)
    resumed = watchman()
    resumed.load_state(by.state())
    assert look(resumed, 1, 1.0, 0.0) == look(by, 1, 1.0, 0.0)
    assert resumed.state() == by.state()


def test_a_version_that_could_not_be_judged_does_not_become_the_good_one(look: Look) -> None:
    by = watchman()
    look(by, 0, 0.0, 5.0)
    assert look(by, 1, 1.0, None).metrics["firewall/missing"] == 1
    assert look(by, 2, None, 5.0).metrics["firewall/missing"] == 1
    assert by.good == 0
    assert look(by, 3, 1.0, 5.0).metrics["firewall/missing"] == 0
    assert by.good == 3


def test_a_forgiven_look_is_nothing_to_compare_with(look: Look) -> None:
    by = watchman(on_trip="roll_back", max_roll_backs=2)
    look(by, 0, 0.0, 5.0)
    look(by, 4, 1.0, 0.0)
    by.roll_back(next_version=6)
    look(by, 5, 9.0, 50.0)
    assert look(by, 6, 0.1, 4.9).action == "none"
    assert look(by, 7, 0.1, 0.0).action == "roll_back"


def test_a_stop_lasts_until_somebody_decides_otherwise(look: Look) -> None:
    by = watchman(on_trip="stop", margin=0.5)
    look(by, 0, 0.0, 5.0)
    assert not by.still_stopped()
    stopped = look(by, 1, 1.0, 0.0)

    def resumed(**settings: Any) -> Watchman:
        other = watchman(**settings)
        other.load_state(by.state())
        return other

    assert resumed(on_trip="stop", margin=0.5).still_stopped() == stopped.reasons
    assert resumed(on_trip="stop", margin=0.4).still_stopped() == stopped.reasons
    for decided in ({"on_trip": "stop", "margin": 0.6}, {"on_trip": "warn"}, {"on_trip": "roll_back"}):
        assert not resumed(**decided).still_stopped()


def test_before_the_first_look_there_is_nothing_to_keep() -> None:
    assert watchman().state() == {}
