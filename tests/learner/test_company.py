"""Who may go on when several learners read one stream."""

from __future__ import annotations

import pytest

from learner.company import Company, role_of

COMPANY = Company(None, {"dpo": 2, "sft": 1})


def said(**states: tuple[int, str]) -> dict[str, dict[str, object]]:
    return {role.replace("__", "/").replace("_", "-"): {"round": r, "state": s} for role, (r, s) in states.items()}


def test_every_rank_of_every_follower_is_waited_for() -> None:
    assert COMPANY.others == ["learner-dpo/0", "learner-dpo/1", "learner-sft/0"]
    assert COMPANY.others == [role_of("dpo", 0), role_of("dpo", 1), role_of("sft", 0)]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ((3, "learning"), True),
        ((3, "done"), True),
        ((4, "waiting"), True),
        ((3, "waiting"), False),
        ((2, "learning"), False),
    ],
)
def test_a_round_is_closed_once_the_slowest_has_collected_it(last: tuple[int, str], expected: bool) -> None:
    reports = said(learner_dpo__0=(4, "learning"), learner_dpo__1=last, learner_sft__0=(3, "learning"))
    assert COMPANY.all_have(3, reports) is expected


def test_who_has_said_nothing_has_collected_nothing() -> None:
    assert not COMPANY.all_have(0, said(learner_dpo__0=(9, "done"), learner_dpo__1=(9, "done")))
    assert Company(None, {}).all_have(0, {})


def test_a_follower_begins_a_round_once_the_first_learner_has() -> None:
    follower = Company("sft", COMPANY.followers)
    assert not follower.first_has_begun(1, {})
    assert not follower.first_has_begun(1, said(learner__0=(0, "learning")))
    assert follower.first_has_begun(1, said(learner__0=(1, "waiting")))
