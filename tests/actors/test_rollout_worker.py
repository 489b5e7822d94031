"""A worker answers tickets with exactly the weights that they name, and never drops one that it cannot deliver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from actors.makers import GroupMaker
from actors.reward_actor import RewardActor
from actors.rollout import Rollout, Score
from actors.rollout_worker import RolloutWorker
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import pack, weights_digest
from protocol.errors import ModelError, RewardError
from protocol.groups import Group
from protocol.recipe import Lora, Recipe
from protocol.stream import GroupReader, Streams
from protocol.tickets import Ticket
from rewards.contract import check_scores
from tests.models import make_tiny_model

Versions = dict[str, bytes]


class Scores:
    """Scores of a reward that is ready after so many questions."""

    def __init__(self, images: np.ndarray, patience: int) -> None:
        self._images, self._patience = images, patience

    def ready(self) -> bool:
        self._patience -= 1
        return self._patience < 0

    def result(self) -> Mapping[str, np.ndarray]:
        brightness_G = self._images.mean(axis=(1, 2, 3)).astype(np.float32)
        return {"brightness": brightness_G}


def score(images: np.ndarray, prompt: str, ticket_id: str, *_: object) -> Scores:
    return Scores(images, patience=int(ticket_id[-1]))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    torch.set_num_threads(1)
    return Policy(str(make_tiny_model(tmp_path_factory.mktemp("worker") / "model")), trainable=Lora(rank=2), seed=0)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "rounds": 2,
            "prompts": {"train": "unused"},
            "batch": {"num_groups": 4, "group_size": 4},
            "sampler": {"num_steps": 3},
            "rewards": [{"name": "jpeg_compressibility"}],
            "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
        }
    )


@pytest.fixture
def versions(policy: Policy) -> Versions:
    """Two versions of the weights, by digest."""
    states = [{name: torch.full_like(t, value) for name, t in policy.trainable_state().items()} for value in (0, 0.1)]
    return {weights_digest(state): pack(state) for state in states}


@pytest.fixture
def rollout(policy: Policy, recipe: Recipe, versions: Versions) -> Rollout:
    return make_rollout(policy, recipe, versions, score)


def make_rollout(policy: Policy, recipe: Recipe, versions: Versions, score: Score) -> Rollout:
    chain = Chain(policy, recipe.sampler)
    return Rollout(chain, GroupMaker(chain, recipe), lambda ticket: versions[ticket.weights_digest], score, "worker")


@pytest.fixture
def tickets(make_ticket: Callable[..., Ticket], versions: Versions) -> list[Ticket]:
    """Four tickets that name the two versions in turn."""
    digests = [*versions] * 2
    return [dataclasses.replace(make_ticket(index=index), weights_digest=digests[index]) for index in range(4)]


def answer(rollout: Rollout, ticket: Ticket) -> Group:
    return rollout.complete(rollout.sample(ticket, lambda: None))


def test_a_group_is_a_function_of_its_ticket(rollout: Rollout, tickets: list[Ticket]) -> None:
    first = [answer(rollout, ticket).content_checksum() for ticket in tickets]
    again = [answer(rollout, ticket).content_checksum() for ticket in reversed(tickets)]
    assert first == again[::-1]
    assert len(set(first)) == 4


def test_a_group_reports_the_digest_of_the_weights_that_made_it(rollout: Rollout, tickets: list[Ticket]) -> None:
    for ticket in tickets:
        assert answer(rollout, ticket).weights_digest == ticket.weights_digest


def test_a_group_that_was_made_with_other_weights_says_so(
    rollout: Rollout, tickets: list[Ticket], versions: Versions
) -> None:
    asked, other = versions
    versions[asked] = versions[other]
    assert answer(rollout, tickets[0]).weights_digest == other


def test_weights_of_another_model_are_refused(rollout: Rollout, tickets: list[Ticket], versions: Versions) -> None:
    versions[tickets[0].weights_digest] = pack({"to_q.lora_A": torch.zeros(2)})
    with pytest.raises(ModelError, match="weights do not fit this model"):
        rollout.sample(tickets[0], lambda: None)


def test_a_group_has_its_siblings_latents_of_all_steps(rollout: Rollout, tickets: list[Ticket]) -> None:
    group = answer(rollout, tickets[1])
    shapes = {name: array.shape for name, array in group.arrays.items()}
    assert shapes == {
        "latents_GSCHW": (4, 4, 4, 8, 8),
        "log_prob_GT": (4, 3),
        "scored_T": (3,),
        "reward_brightness_G": (4,),
    }
    assert group.non_finite_field() is None
    assert group.num_images == 4


def out_of_bounds(*arguments: object) -> Any:
    """What must not be asked."""
    raise AssertionError(f"asked for {arguments}")


@pytest.fixture
def encoding(policy: Policy, recipe: Recipe) -> Rollout:
    """A rollout that only encodes a dataset's images; they depend on no weights and nobody scores them."""
    changes = {"prompts": {}, "data": [{"path": "photos"}], "rewards": [], "algorithm": {"name": "sft"}}
    recipe = Recipe.model_validate({**recipe.model_dump(mode="json"), **changes})
    chain, shape_CHW = Chain(policy, recipe.sampler), policy.latent_shape_CHW

    def moments(ticket: Ticket) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, *shape_CHW), float(ticket.row)), torch.ones(1, *shape_CHW)

    return Rollout(chain, GroupMaker(chain, recipe, moments), out_of_bounds, out_of_bounds, "worker")


def test_a_group_that_is_only_encoded_needs_neither_weights_nor_scores(
    encoding: Rollout, tickets: list[Ticket]
) -> None:
    for ticket in tickets:
        group = answer(encoding, ticket)
        assert group.weights_digest == ticket.weights_digest
        assert {name: array.shape for name, array in group.arrays.items()} == {"real_x0_CHW": (4, 8, 8)}
        # Five standard errors of a draw with standard deviation 1 about the row's number.
        assert abs(group.array("real_x0_CHW").mean() - ticket.row) < 5 / 16
        assert group.num_images == 0
        assert group.content_checksum() == answer(encoding, ticket).content_checksum()


def test_a_worker_delivers_groups_that_are_only_encoded(
    encoding: Rollout, streams: Streams, recipe: Recipe, tickets: list[Ticket]
) -> None:
    streams.issue(tickets)
    RolloutWorker("0", encoding, streams, recipe).run(until_idle(streams))
    assert sorted(group.ticket_id for group in groups_in(streams)) == [ticket.ticket_id for ticket in tickets]


def until_idle(streams: Streams) -> Callable[[], bool]:
    """Tells a worker to stop once no ticket is out."""

    def idle() -> bool:
        depth = streams.queue_depth()
        return depth.waiting == depth.claimed == 0

    return idle


def groups_in(streams: Streams) -> Iterator[Group]:
    reader = GroupReader(streams, range(streams.num_shards))
    while arrivals := reader.read(block_s=0):
        yield from (arrival.content for arrival in arrivals if isinstance(arrival.content, Group))


def test_a_worker_answers_every_ticket_once(
    rollout: Rollout, streams: Streams, recipe: Recipe, tickets: list[Ticket]
) -> None:
    streams.issue(tickets)
    RolloutWorker("0", rollout, streams, recipe).run(until_idle(streams))
    groups = {group.ticket_id: group for group in groups_in(streams)}
    assert sorted(groups) == [ticket.ticket_id for ticket in tickets]
    assert streams.counters()["groups_appended"] == 4
    for ticket in tickets:
        assert groups[ticket.ticket_id].content_checksum() == answer(rollout, ticket).content_checksum()


def test_a_ticket_of_a_worker_that_died_is_answered_by_another(
    rollout: Rollout, streams: Streams, recipe: Recipe, tickets: list[Ticket]
) -> None:
    streams.issue(tickets[:2])
    assert streams.take("dead", block_s=0, claim_idle_s=60) is not None
    impatient = recipe.model_copy(update={"redis": recipe.redis.model_copy(update={"claim_idle_s": 0.2})})
    RolloutWorker("0", rollout, streams, impatient).run(until_idle(streams))
    assert sorted({group.ticket_id for group in groups_in(streams)}) == [ticket.ticket_id for ticket in tickets[:2]]


class Death(BaseException):
    """The end of a process, as far as a test in one process can have it."""


@pytest.mark.parametrize(("dies_in", "num_delivered"), [("append", 0), ("acknowledge", 1)])
def test_a_worker_that_dies_while_it_delivers_leaves_its_ticket_to_another(
    rollout: Rollout,
    streams: Streams,
    recipe: Recipe,
    tickets: list[Ticket],
    monkeypatch: pytest.MonkeyPatch,
    dies_in: str,
    num_delivered: int,
) -> None:
    def die(_: object) -> None:
        raise Death

    monkeypatch.setattr(streams, dies_in, die)
    streams.issue(tickets[:1])
    with pytest.raises(Death):
        RolloutWorker("0", rollout, streams, recipe).run(until_idle(streams))
    assert len(list(groups_in(streams))) == num_delivered
    assert streams.queue_depth().claimed == 1


def test_an_error_of_a_reward_reaches_whoever_runs_the_worker(
    policy: Policy, versions: Versions, streams: Streams, recipe: Recipe, tickets: list[Ticket]
) -> None:
    class Broken(Scores):
        def result(self) -> Mapping[str, np.ndarray]:
            raise RewardError("the judge has resigned")

    rollout = make_rollout(policy, recipe, versions, lambda images, *_: Broken(images, 0))
    streams.issue(tickets[:1])
    with pytest.raises(RewardError, match="the judge has resigned"):
        RolloutWorker("0", rollout, streams, recipe).run(until_idle(streams))
    assert list(groups_in(streams)) == []
    assert streams.queue_depth().claimed == 1


def test_a_worker_says_how_busy_it_is(
    rollout: Rollout, streams: Streams, recipe: Recipe, tickets: list[Ticket]
) -> None:
    streams.issue(tickets)
    RolloutWorker("7", rollout, streams, recipe).run(until_idle(streams))
    said: dict[str, Any] = streams.progress()["rollout/7"]
    assert 0 <= said["busy_s"] <= said["alive_s"]


def test_a_version_is_fetched_once_and_its_cost_is_no_part_of_the_groups(
    rollout: Rollout, versions: Versions, tickets: list[Ticket]
) -> None:
    assert rollout.fetched is None
    first = answer(rollout, tickets[0])
    fetched = rollout.fetched
    answer(rollout, tickets[2])  # Of the same version.
    assert rollout.fetched is fetched is not None
    assert (fetched.version, fetched.size_bytes) == (tickets[0].version, len(versions[tickets[0].weights_digest]))
    answer(rollout, tickets[1])
    assert rollout.fetched is not fetched
    assert answer(rollout, tickets[0]).content_checksum() == first.content_checksum()


def test_a_worker_tells_at_once_what_it_fetched_and_how_many_images_it_has_made(
    rollout: Rollout, versions: Versions, streams: Streams, recipe: Recipe, tickets: list[Ticket]
) -> None:
    streams.issue(tickets[:1])
    told: list[dict[str, Any]] = []

    def until_told() -> bool:
        told.append(streams.progress().get("rollout/7", {}))
        return "fetch_s" in told[-1] and told[-1]["images"] > 0

    RolloutWorker("7", rollout, streams, recipe).run(until_told)
    assert told[-1]["images"] == recipe.batch.group_size
    assert told[-1]["size_bytes"] == len(versions[tickets[0].weights_digest])
    assert [words["version"] for words in told if words.get("images") == 0 and "version" in words]


def test_a_reward_actor_scores_a_group_as_one_batch() -> None:
    batches = []

    def remember(images: np.ndarray, prompts: list[str]) -> list[int]:
        batches.append((images.shape, prompts))
        return [1, 2, 3]

    actor = RewardActor("mine", remember, check_scores)
    scores = actor.score(np.zeros((3, 8, 8, 3), np.uint8), "a red seven")
    assert scores.tolist() == [1, 2, 3]
    assert scores.dtype == np.float32
    assert batches == [((3, 8, 8, 3), ["a red seven"] * 3)]
