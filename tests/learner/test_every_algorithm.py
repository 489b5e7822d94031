"""Every algorithm, from every kind of source, through the whole learner: real Redis, DeepSpeed, diffusers, datasets."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.redis_server import RedisServer
from diffusion.weights import unpack, weights_digest
from learner.algorithms.selection import make_pairs
from learner.checkpoint import checkpoints_in, latest_checkpoint
from learner.engine import Engine
from learner.train import LearnerRank
from protocol.derived import num_branches
from protocol.errors import TrainingError
from protocol.groups import Group
from protocol.recipe import Recipe
from protocol.scores import part_name
from tests.learner.one_process_run import Run, Scores, redness
from tests.small_datasets import library_cache, write_images, write_pairs

pytestmark = pytest.mark.usefixtures("gang_of_one")

LN_2 = math.log(2)
P, G, T, ROUNDS, PROBES = 4, 3, 3, 3, 2
NUM_SCORED = T - 1
M = 3
"""States of an excursion."""

ON_PROMPTS: dict[str, Any] = {"prompts": {"train": "prompts.txt"}, "rewards": [{"name": "jpeg_compressibility"}]}
ON_IMAGES: dict[str, Any] = {"data": [{"path": "images", "flip": True}]}
ON_PAIRS: dict[str, Any] = {"data": [{"path": "pairs", "kind": "pairs"}]}
ON_ALL: dict[str, Any] = {**ON_PROMPTS, "data": [*ON_IMAGES["data"], *ON_PAIRS["data"]]}
ON_PROMPTS_AND_PAIRS: dict[str, Any] = {**ON_PROMPTS, **ON_PAIRS}
SELF_PLAY = [{"rounds": 2, "beta_half": 100}, {"rounds": 1, "beta_half": 200, "learning_rate": 5e-4}]
GUIDED = {"sampler": {"num_steps": T, "guidance_scale": 2.0}}


def case(name: str, source: dict[str, Any], settings: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """The parts of a recipe in which one algorithm's run differs from another's."""
    return {**source, "algorithm": {"name": name, **(settings or {})}, **others}


CASES: dict[str, dict[str, Any]] = {
    "prdp": case("prdp", ON_PROMPTS, {"kl_weight": 1e-2, "clip_eps": 3e-5, "num_updates": 2}),
    "prdp_no_window": case("prdp", ON_PROMPTS, {"kl_weight": 1e-2, "clip_eps": None, "num_updates": 2}),
    "policy_gradient": case("policy_gradient", ON_PROMPTS, {"clip_range": 1e-5, "num_updates": 3}, **GUIDED),
    "policy_gradient_late": case(
        "policy_gradient", ON_PROMPTS, {"clip_range": None, "num_updates": 2, "kl_coef": 0.1}, lag=1
    ),
    "ddpo": case("ddpo", ON_PROMPTS, {"clip_range": None, "num_updates": 2, "inner_minibatches": 2}, **GUIDED),
    "spin_exact": case("spin_exact", ON_IMAGES, {"iterations": [{"rounds": 2}, {"rounds": 1}], "num_updates": 2}),
    "sft_of_all": case("sft", ON_ALL, {"num_updates": 2}),
    "sft_online": case("sft", ON_PROMPTS),
    "sft_of_images": case("sft", ON_IMAGES, {"inner_minibatches": 2}),
    "dpo_online": case("dpo", ON_PROMPTS, {"beta_half": 100, "pairs": {"rule": "all_pairs"}, "inner_minibatches": 2}),
    "dpo_of_pairs": case("dpo", ON_PAIRS, {"beta_full": 100}),
    "dpo_of_both": case("dpo", ON_PROMPTS_AND_PAIRS, {"beta_full": 100, "prompt_dropout": 0.5}, lag=1),
    "cpo": case("cpo", ON_PROMPTS_AND_PAIRS, {"beta_full": 100}),
    "spin": case("spin", ON_IMAGES, {"iterations": SELF_PLAY, "num_updates": 2}),
    "ncp_sft": case("ncp_sft", ON_PROMPTS, {"select": "random"}),
    "ncp_dpo": case("ncp_dpo", ON_PAIRS, {"beta_full": 1e4, "num_updates": 2}),
    "ncp_cpo": case("ncp_cpo", ON_PROMPTS, {"beta_full": 1e4, "perception": {"norm": "relative"}}),
    "sharpening_sft": case("sharpening_sft", ON_PROMPTS, {"excursion": {"noise": "fresh"}}, lag=1),
    "sharpening_sft_of_images": case(
        "sharpening_sft", {**ON_IMAGES, "rewards": ON_PROMPTS["rewards"]}, {"excursion": {"noise": "fresh"}}
    ),
    "sharpening_rlhf": case(
        "sharpening_rlhf", ON_PROMPTS, {"beta_full": 100, "excursion": {"noise": "shared"}, "inner_minibatches": 2}
    ),
    "sharpening_rlhf_final": case(
        "sharpening_rlhf",
        ON_PROMPTS,
        {"beta_full": 100, "select_on": "final_x0", "excursion": {"noise": "coupled", "eta": 0.5}},
    ),
    "sharpening_sft_through_steps": case(
        "sharpening_sft",
        ON_PROMPTS,
        {"excursion": {"noise": "fresh"}, "backprop_through_steps": True, "prompt_dropout": 0.3},
    ),
}
QUICK = (
    *("prdp", "policy_gradient_late", "ddpo", "spin_exact", "sft_of_all", "dpo_online", "dpo_of_pairs", "cpo", "spin"),
    *("ncp_sft", "ncp_dpo", "ncp_cpo", "sharpening_sft", "sharpening_rlhf"),
)
"""What the suite trains: each algorithm, each source. The rest is slow."""
REPEATED = ("sft_of_all", "sharpening_rlhf")
REBATCHED = ("ddpo", "ncp_dpo")
"""Of these what the suite trains again, and in other micro-batches."""


def parameters(quick: tuple[str, ...], names: tuple[str, ...] = tuple(CASES)) -> Any:
    """All cases, of which those that are not quick are slow."""
    marks = {name: () if name in quick else pytest.mark.slow for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@dataclass(frozen=True)
class Desk:
    """Starts runs: `desk.run("sft", CASES["sft_online"])`."""

    folder: Path
    open_streams: Callable[..., Any]
    server: RedisServer

    def run(
        self, name: str, parts: Mapping[str, Any], *, attempt: int = 0, scores: Scores = redness, **others: Any
    ) -> Run:
        """Prepares a run in a directory of that name."""
        recipe = Recipe.model_validate({**self._base(), **parts, **others})
        run_id = f"{self.folder.name}-{name}-{os.getpid()}"
        return Run(
            recipe,
            self.folder / f"run-{name}",
            lambda: self.open_streams(self.server, run_id=run_id, attempt=attempt, num_shards=1),
            scores,
        )

    def _base(self) -> dict[str, Any]:
        return {
            "rounds": ROUNDS,
            "model": {"path": str(self.folder / "model"), "trainable": {"rank": 2, "alpha": 2}},
            "batch": {"num_groups": P, "group_size": G},
            "sampler": {"num_steps": T},
            "learner": {"learning_rate": 1e-3, "micro_batch_size": 8, "num_parity_probes": PROBES},
            "checkpoints": {"every_rounds": 100},
        }


@contextmanager
def desk_in(folder: Path, model: str, open_streams: Callable[..., Any], server: RedisServer) -> Iterator[Desk]:
    """A folder with a model, prompts and two datasets, which recipes name from there."""
    (folder / "model").symlink_to(model)
    (folder / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    write_images(folder / "images")
    write_pairs(folder / "pairs")
    with pytest.MonkeyPatch.context() as patch, library_cache(folder / "library-cache"):
        patch.chdir(folder)
        yield Desk(folder, open_streams, server)


@pytest.fixture(scope="module")
def desk(
    tiny_model: str, redis_server: RedisServer, open_streams: Callable[..., Any], tmp_path_factory: Any
) -> Iterator[Desk]:
    with desk_in(tmp_path_factory.mktemp("every"), tiny_model, open_streams, redis_server) as desk:
        yield desk


Trained = Callable[[str], Run]


@pytest.fixture(scope="module")
def trained(desk: Desk) -> Trained:
    """A case's finished run, trained once for all tests."""

    @cache
    def trained_(name: str) -> Run:
        run = desk.run(name, CASES[name])
        run.train()
        return run

    return trained_


def weights_of(run: Run) -> Mapping[str, Tensor]:
    """The weights that a run ended with."""
    checkpoint = latest_checkpoint(run.run_dir)
    assert checkpoint is not None
    assert checkpoint.meta.round == run.recipe.rounds
    return unpack(checkpoint.version_bytes(run.recipe.rounds))


def groups_of(run: Run, round_: int) -> list[Group]:
    """What the learner consumed in a round; none of these runs delivers a group twice."""
    return [group for group in run.groups if group.round == round_]


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers of a row of metrics."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers_in(part)
    elif isinstance(value, int | float):
        yield value


# --- what holds for all ---------------------------------------------------------------------------------


@parameters(QUICK)
def test_every_number_is_finite_and_the_weights_move_in_every_round(trained: Trained, name: str) -> None:
    run = trained(name)
    rows, ledger = run.lines("metrics.jsonl"), run.lines("ledger.jsonl")
    assert [row["round"] for row in rows] == list(range(ROUNDS))
    assert all(math.isfinite(number) for number in numbers_in(rows))
    assert all(min(row["updates"]["grad_norm"]) > 0 for row in rows)
    assert [row["step"] for row in rows] == [(u + 1) * run.recipe.algorithm.num_steps_per_round for u in range(ROUNDS)]
    assert len({ledger[0]["digest"], *(row["published_digest"] for row in ledger)}) == ROUNDS + 1
    assert ledger[-1]["published_digest"] == weights_digest(weights_of(run))


@parameters(QUICK)
def test_every_round_is_made_with_the_version_that_the_plan_names(trained: Trained, name: str) -> None:
    run = trained(name)
    ledger = run.lines("ledger.jsonl")
    digests = [ledger[0]["digest"], *(row["published_digest"] for row in ledger)]
    expected = {"spin": [0, 0, 2], "spin_exact": [0, 0, 2]}.get(
        run.recipe.algorithm.name, [max(0, u - run.recipe.lag) for u in range(ROUNDS)]
    )
    assert [row["version"] for row in ledger] == expected
    if run.recipe.iterations:
        per_round = run.recipe.algorithm.num_steps_per_round
        told = [(row["spin/iteration"], row["spin/step_in_iteration"]) for row in run.lines("metrics.jsonl")]
        assert told == [(0, per_round), (0, 2 * per_round), (1, per_round)]
    assert [row["digest"] for row in ledger] == [digests[version] for version in expected]
    assert {(group.version, group.weights_digest) for group in run.groups} == {(v, digests[v]) for v in expected}
    assert Counter(group.round for group in run.groups) == dict.fromkeys(range(ROUNDS), P)


@parameters(REPEATED)
def test_the_same_recipe_ends_with_the_same_bits(desk: Desk, trained: Trained, name: str) -> None:
    again = desk.run(f"{name}-again", CASES[name])
    again.train()
    for field in ("digest", "published_digest", "tickets", "checksums"):
        assert [row[field] for row in again.lines("ledger.jsonl")] == [
            row[field] for row in trained(name).lines("ledger.jsonl")
        ], field


@parameters(REBATCHED)
def test_the_size_of_micro_batches_changes_rounding_alone(desk: Desk, trained: Trained, name: str) -> None:
    learner = {"learning_rate": 1e-3, "micro_batch_size": 5, "num_parity_probes": PROBES}
    other = desk.run(f"{name}-other", CASES[name], learner=learner)
    other.train()
    one, two = weights_of(trained(name)), weights_of(other)
    apart = sum(float((one[tensor] - two[tensor]).double().square().sum()) for tensor in one) ** 0.5
    moved = sum(float(one[tensor].double().square().sum()) for tensor in one if ".lora_B." in tensor) ** 0.5
    assert moved > 0
    # Sums over all of a trajectory's latent entries round the most.
    assert apart < (0.02 if name == "spin_exact" else 1e-3) * moved
    norms = [run.lines("metrics.jsonl")[0]["updates"]["grad_norm"][0] for run in (trained(name), other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


# --- values before the first step -----------------------------------------------------------------------

STARTS_AT_LN_2 = (
    *("spin", "spin_exact", "dpo_online", "dpo_of_pairs", "dpo_of_both", "ncp_dpo"),
    *("sharpening_rlhf", "sharpening_rlhf_final"),
)


@parameters(QUICK, STARTS_AT_LN_2)
def test_a_loss_on_log_ratios_starts_at_ln_2_where_policy_and_reference_are_one(trained: Trained, name: str) -> None:
    run = trained(name)
    first = [row["updates"]["loss"][0] for row in run.lines("metrics.jsonl")]
    starts = run.plan.iteration_starts or (0,)
    assert [first[start] for start in starts] == pytest.approx([LN_2] * len(starts), abs=1e-12)
    others = [loss for round_, loss in enumerate(first) if round_ not in starts]
    assert all(abs(loss - LN_2) > 1e-9 for loss in others)


@parameters(QUICK, ("prdp", "prdp_no_window", "policy_gradient", "policy_gradient_late", "ddpo"))
def test_every_ratio_is_1_before_the_first_step_of_a_round_on_policy(trained: Trained, name: str) -> None:
    run = trained(name)
    rows = run.lines("metrics.jsonl")
    if run.recipe.algorithm.name == "prdp":
        assert rows[0]["updates"]["prdp/regime_ratio"][0] == 0
        assert all(row["updates"]["prdp/saturated_fraction"][0] == 0 for row in rows)
        assert rows[0]["kl"] == 0
        return
    for row, made in zip(rows, run.lines("ledger.jsonl"), strict=True):
        on_policy = made["version"] == row["round"]
        first, *later = row["updates"]["pg/ratio_abs_minus_1"]
        assert (first == 0) == on_policy
        assert min(later) > 0
        assert (row["kl"] is None, row["kl_off_policy"] is None) == (not on_policy, on_policy)


# --- executed costs, against algorithms.md 7.2 -----------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """Network evaluations of a unit: an image, a pair or a group, of a forward pass each. The table has 2 F for what
    `backward` counts once, and counts a backward pass through the encoder's input, which is no evaluation."""

    forward: int
    backward: int
    encoder: int = 0


PRICES = {
    "sft": Price(1, 1),
    "dpo": Price(2 + 2, 2),
    "cpo": Price(2, 2),
    "spin": Price(2 + 2, 2),
    "ncp_sft": Price(1, 1, encoder=1 + 1),
    "ncp_dpo": Price(2 + 2, 2, encoder=4 + 2),
    "ncp_cpo": Price(2, 2, encoder=2 + 2),
    "sharpening_sft": Price(M, M),
    "sharpening_rlhf": Price(2 * M + 2 * M, 2 * M),
}
ON_UNITS = tuple(name for name, parts in CASES.items() if parts["algorithm"]["name"] in PRICES)
ON_TRAJECTORIES = tuple(name for name in CASES if name not in ON_UNITS)


def num_units(run: Run, group: Group) -> int:
    """Images, pairs or groups that are learnt from."""
    algorithm = run.recipe.algorithm
    if algorithm.name == "spin":
        return G
    if "x0_GCHW" in group.arrays and hasattr(algorithm, "pairs"):
        return len(
            make_pairs(
                torch.from_numpy(group.array(part_name(run.recipe.rewards[0].label)).copy())[None], algorithm.pairs
            ).group_Q
        )
    return 1


@parameters(QUICK, ON_UNITS)
def test_a_unit_costs_the_learner_what_the_table_says(trained: Trained, name: str) -> None:
    run = trained(name)
    algorithm = run.recipe.algorithm
    price = PRICES[algorithm.name]
    for row in run.lines("metrics.jsonl"):
        units = algorithm.num_updates * sum(num_units(run, group) for group in groups_of(run, row["round"]))
        # Before the first step one pair is evaluated to see that policy and reference are one.
        units_forward = units + (row["round"] == 0 and algorithm.name in ("dpo", "ncp_dpo"))
        # In the first step of every tenth round one more candidate of each group is compared, and what is held out.
        compares = row["round"] == 0 and algorithm.name.startswith("sharpening")
        compared = P // algorithm.inner_minibatches * (M + 1) if compares else 0
        assert row["cost/unet_forward"] == units_forward * price.forward + compared
        assert row["cost/unet_backward"] == units * price.backward
        assert row["cost/encoder_forward"] == units_forward * price.encoder


def parity_forward(run: Run, *, on_policy: bool) -> int:
    """Evaluations that only compare: with what the rollouts stored, and but for PRDP with the reference."""
    probed = min(run.recipe.learner.num_parity_probes * run.recipe.learner.micro_batch_size, P * G * NUM_SCORED)
    # Self-play evaluates its opponent as a network of its own, also where that is the policy.
    is_other = not on_policy or bool(run.recipe.iterations)
    networks = 1 if run.recipe.algorithm.name == "prdp" else 2 + is_other
    return probed * networks * num_branches(run.recipe)


def frozen_forward(run: Run, row: Mapping[str, Any], *, on_policy: bool) -> int:
    """Passes over a round before its first step: reference or opponent, the window's centre, and the first pass A."""
    algorithm, differs = run.recipe.algorithm, row["parity/max_abs"] > 0
    if algorithm.name == "prdp":
        return 1 + differs
    if algorithm.name == "spin_exact":
        return 2 + 2
    return differs + (not on_policy) + (getattr(algorithm, "kl_coef", 0) > 0)


@parameters(QUICK, ON_TRAJECTORIES)
def test_a_trajectory_costs_the_learner_what_the_table_says(trained: Trained, name: str) -> None:
    run = trained(name)
    algorithm = run.recipe.algorithm
    traversal = P * G * NUM_SCORED * num_branches(run.recipe)
    width = 2 if algorithm.name == "spin_exact" else 1
    # Pass A of the first step is at hand, but for the KL's, which was not asked of the rollouts.
    reused = 0 if getattr(algorithm, "kl_coef", 0) > 0 else 1 / algorithm.inner_minibatches
    for row, made in zip(run.lines("metrics.jsonl"), run.lines("ledger.jsonl"), strict=True):
        on_policy = made["version"] == row["round"]
        before = parity_forward(run, on_policy=on_policy) + frozen_forward(run, row, on_policy=on_policy) * traversal
        pass_a = (algorithm.num_updates - reused) * width * traversal
        assert row["cost/unet_forward"] == before + pass_a + row["cost/unet_backward"]
        assert row["cost/encoder_forward"] == 0
        all_of_pass_b = algorithm.num_updates * width * traversal
        if name in ("prdp", "policy_gradient"):
            assert 0 < row["cost/unet_backward"] < all_of_pass_b
        else:
            assert row["cost/unet_backward"] == all_of_pass_b


def price_of_sampling(run: Run, groups: Sequence[Group]) -> int:
    """U-Net evaluations of rollouts (algorithms.md 7.2): of each sample T steps, and of an excursion M more."""
    price, branches = 0, num_branches(run.recipe)
    for group in groups:
        if {"latents_GSCHW", "x0_GCHW"} & set(group.arrays):
            price += G * T * branches
        if "states_GMCHW" in group.arrays:
            from_prompt = run.recipe.source_kinds == ("prompts",)
            price += G * (len(group.array("state_timestep_M")) + from_prompt * T * branches)
    return price


@parameters(QUICK)
def test_images_are_decoded_and_rewards_asked_as_the_table_says(trained: Trained, name: str) -> None:
    run = trained(name)
    algorithm = run.recipe.algorithm
    for row in run.lines("metrics.jsonl"):
        groups = groups_of(run, row["round"])
        sampled = [group for group in groups if {"latents_GSCHW", "x0_GCHW", "states_GMCHW"} & set(group.arrays)]
        num_images = G * len(sampled)
        if algorithm.name.startswith("sharpening") and algorithm.select_on != "final_x0":
            num_images = G * sum(len(group.array("state_timestep_M")) for group in groups)
        assert row["cost/vae_decode"] == (0 if algorithm.name == "spin_exact" else num_images)
        assert row["cost/unet_sampling"] == price_of_sampling(run, groups)
        assert row["cost/reward_queries"] == (num_images if run.recipe.rewards else 0)


def test_a_window_that_was_left_costs_no_backward_pass(trained: Trained) -> None:
    for row in trained("prdp").lines("metrics.jsonl"):
        entered, left = row["updates"]["prdp/saturated_fraction"]
        assert entered == 0
        assert left > 0
        entries = P * G * NUM_SCORED
        assert row["cost/unet_backward"] >= entries + (1 - left) * entries


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # What DeepSpeed imports for sharding alone.
def test_activations_that_are_computed_again_give_the_same_weights(desk: Desk, stage: int) -> None:
    learner = {"learning_rate": 1e-3, "micro_batch_size": 8, "zero_stage": stage}
    runs = [
        desk.run(
            f"checkpointing-{stage}-{on}", CASES["prdp"], rounds=1, learner={**learner, "gradient_checkpointing": on}
        )
        for on in (False, True)
    ]
    saved = [peak_of_saved_tensors(run) for run in runs]
    assert weights_digest(weights_of(runs[0])) == weights_digest(weights_of(runs[1]))
    assert saved[1] < 0.6 * saved[0]


def peak_of_saved_tensors(run: Run) -> int:
    """Trains a run; returns the most bytes that one graph's first pass has kept for its backward pass."""
    most, kept = 0, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    backward = Engine.apply

    def spied(engine: Engine, losses: Any) -> float:
        nonlocal most, kept

        def forward(loss: Callable[[], Tensor]) -> Tensor:
            nonlocal most, kept
            kept = 0
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss()
            most = max(most, kept)
            return value

        return backward(engine, [functools.partial(forward, loss) for loss in losses])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "apply", spied)
        run.train()
    return most


# --- nothing to learn from ------------------------------------------------------------------------------


def alike(images: np.ndarray) -> np.ndarray:
    """Every image is worth the same."""
    return np.full(len(images), 0.25, np.float32)


def only_ties(desk: Desk, run_name: str, name: str, *, attempt: int = 0, stage: int = 0) -> Run:
    """A case's run whose rewards all tie."""
    learner = {"learning_rate": 1e-3, "weight_decay": 0.5, "micro_batch_size": 8, "zero_stage": stage}
    parts = {**CASES[name], "rounds": 2, "learner": learner, "checkpoints": {"every_rounds": 1}}
    return desk.run(run_name, parts, attempt=attempt, scores=alike)


@parameters(
    ("prdp", "sharpening_rlhf"),
    ("prdp", "policy_gradient", "ddpo", "dpo_online", "ncp_cpo", "sharpening_rlhf", "sharpening_rlhf_final"),
)
def test_a_round_in_which_all_rewards_tie_takes_no_step_and_is_counted(desk: Desk, name: str) -> None:
    run = only_ties(desk, f"{name}-tied", name)
    rows, ledger = run.train(), run.lines("ledger.jsonl")
    assert {row["published_digest"] for row in ledger} == {ledger[0]["digest"]}
    per_round = run.recipe.algorithm.num_steps_per_round
    assert [row["skipped_updates"] for row in rows] == [per_round, 2 * per_round]
    assert [row["step"] for row in rows] == [0, 0]
    assert all(math.isfinite(number) for number in numbers_in(rows))
    assert all(row["loss"] == row["grad_norm"] == row["cost/unet_backward"] == 0 for row in rows)
    if hasattr(run.recipe.algorithm, "pairs") or "sharpening" in name:
        assert all(row["pairs/tied"] == 1 for row in rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # What DeepSpeed imports for sharding alone.
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_a_learner_goes_on_from_a_checkpoint_before_its_first_step(desk: Desk, stage: int) -> None:
    run_name = f"stage{stage}-tied"
    train_and_kill(only_ties(desk, run_name, "dpo_online", stage=stage), 1)
    resumed = only_ties(desk, run_name, "dpo_online", stage=stage, attempt=1)
    rows, ledger = resumed.train(), resumed.lines("ledger.jsonl")
    assert [(row["step"], row["skipped_updates"]) for row in rows] == [(0, 2), (0, 4)]
    assert {row["published_digest"] for row in ledger} == {ledger[0]["digest"]}


@pytest.mark.parametrize("name", ["cpo", pytest.param("ncp_cpo", marks=pytest.mark.slow)])
def test_a_losers_error_that_grows_beyond_its_bound_stops_the_run_before_it_publishes(desk: Desk, name: str) -> None:
    parts = {**CASES[name], "algorithm": {**CASES[name]["algorithm"], "max_loser_error_ratio": 0.9}}
    run = desk.run(f"{name}-unbounded", parts)
    with pytest.raises(TrainingError, match=r"the loser's error has grown 1\.0 times"):
        run.train()
    assert not (run.run_dir / "ledger.jsonl").exists()


# --- killed and resumed ---------------------------------------------------------------------------------


class KilledError(Exception):
    """What ends a learner in the middle of a run."""


def train_and_kill(run: Run, after_rounds: int) -> None:
    """Trains until a version is published, and no further."""
    publish = LearnerRank._publish

    def publish_and_die(rank: LearnerRank, version: int) -> None:
        publish(rank, version)
        if version == after_rounds:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnerRank, "_publish", publish_and_die)
        with pytest.raises(KilledError):
            run.train()


@pytest.fixture
def opponents(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(round, digest) of each time that the learner took up an opponent's weights."""
    seen, holding = [], LearnerRank._holding

    def spied(rank: LearnerRank, version: int) -> Any:
        context = holding(rank, version)

        class Spy:
            def __enter__(self) -> None:
                context.__enter__()
                seen.append((rank._round, weights_digest(rank._policy.trainable_state())))

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        return Spy()

    monkeypatch.setattr(LearnerRank, "_holding", spied)
    return seen


ITERATION = {"rounds": 2, "learning_rate": 1e-3}
EACH_ROUND = {"checkpoints": {"every_rounds": 1}}


@pytest.mark.parametrize("name", ["spin", pytest.param("spin_exact", marks=pytest.mark.slow)])
def test_self_play_goes_on_from_what_it_published_also_when_killed_in_every_iteration(
    desk: Desk, opponents: list[tuple[int, str]], name: str
) -> None:
    """S-T10: generator, reference and start of iteration k + 1 have the digest published at the end of k."""
    beta = {"beta_half": 100} if name == "spin" else {}
    parts = case(name, ON_IMAGES, {"iterations": [ITERATION | beta] * 3, "num_updates": 2}, rounds=6, **EACH_ROUND)
    parts["learner"] = {"warmup_steps": 1, "decay": "linear", "micro_batch_size": 8}
    parts["batch"] = {"num_groups": 3, "group_size": 1}
    unbroken = desk.run(f"{name}-unbroken", parts)
    unbroken.train()
    expected = unbroken.lines("ledger.jsonl")
    opponents.clear()
    runs = [desk.run(f"{name}-killed", parts, attempt=attempt) for attempt in range(4)]
    for run, after_rounds in zip(runs, (1, 3, 5), strict=False):
        train_and_kill(run, after_rounds)
    rows, ledger = runs[-1].train(), runs[-1].lines("ledger.jsonl")
    published = {0: ledger[0]["digest"], **{row["published_version"]: row["published_digest"] for row in ledger}}
    for row, metrics in zip(ledger, rows, strict=True):
        start = row["round"] // 2 * 2
        assert (row["version"], row["digest"]) == (start, published[start])
        assert {digest for round_, digest in opponents if round_ == row["round"]} <= {published[start]}
        if row["round"] == start:
            assert metrics["updates"]["loss"][0] == pytest.approx(LN_2, abs=1e-12)
    assert {round_ for round_, _ in opponents} == set(range(6))
    assert {group.weights_digest for run in runs for group in run.groups} == {published[start] for start in (0, 2, 4)}
    for field in ("digest", "published_digest", "tickets", "checksums"):
        assert [row[field] for row in ledger] == [row[field] for row in expected], field
    assert [row["updates"] for row in rows] == [row["updates"] for row in unbroken.lines("metrics.jsonl")]


def test_every_iteration_of_self_play_starts_adamw_afresh(desk: Desk) -> None:
    """The first step from moments of 0 moves a weight by the learning rate, whatever its gradient."""
    rate, once = 3e-4, {"rounds": 1, "beta_half": 100}
    iterations = [once | {"learning_rate": 1e-3}, once | {"learning_rate": rate}]
    parts = case("spin", ON_IMAGES, {"iterations": iterations}, rounds=2, **EACH_ROUND)
    run = desk.run("spin-afresh", parts, learner={"weight_decay": 0.0})
    run.train()
    before, after = (unpack(one.version_bytes(one.meta.round)) for one in checkpoints_in(run.run_dir))
    steps = torch.cat([(after[name] - before[name]).abs().flatten() for name in after if ".lora_B." in name])
    assert float((((steps / rate) - 1).abs() < 0.01).float().mean()) > 0.9


def test_the_statistics_of_prompts_outlive_a_killed_learner(desk: Desk) -> None:
    """B5: six rewards or more of a prompt are standardised by its own."""
    parts = case("ddpo", ON_PROMPTS, {"min_count": 7, "buffer_size": 9}, rounds=3, **EACH_ROUND)
    unbroken = desk.run("ddpo-unbroken", parts).train()
    train_and_kill(desk.run("ddpo-killed", parts), 2)
    resumed = desk.run("ddpo-killed", parts, attempt=1).train()
    rare = [row["pg/fallback_fraction"] for row in unbroken]
    assert rare[0] == 1
    assert rare[2] == 0
    assert [row["updates"] for row in resumed] == [row["updates"] for row in unbroken]
