"""What a group is made of, by what its ticket starts from and by what is learnt from: real model, real files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.datasets import Images
from actors.makers import GroupMaker, Made
from actors.real import RealImages, open_real_images
from cluster.sources import prepare_sources, read_plan
from diffusion.chain import Chain
from diffusion.policy import Policy
from protocol.datasets import Manifest
from protocol.paths import manifest_path
from protocol.recipe import Recipe
from protocol.tickets import Ticket
from tests.models import make_tiny_model
from tests.small_datasets import CAPTIONS, LABELS, library_cache, random_image, write_images, write_pairs

G, T, M = 3, 3, 3
CHW = (4, 8, 8)
IMAGE = (16, 16, 3)
ON_PROMPTS: dict[str, Any] = {"prompts": {"train": "prompts.txt"}, "rewards": [{"name": "jpeg_compressibility"}]}
ON_IMAGES: dict[str, Any] = {"data": [{"path": "images", "flip": True}]}
ON_PAIRS: dict[str, Any] = {"data": [{"path": "pairs", "kind": "pairs", "flip": True}]}
ON_UNFLIPPED_PAIRS: dict[str, Any] = {"data": [{"path": "pairs", "kind": "pairs"}]}
ON_SCORED_IMAGES: dict[str, Any] = {**ON_IMAGES, "rewards": ON_PROMPTS["rewards"]}
PRDP = {"name": "prdp", "kl_weight": 1e-2, "clip_eps": None}
SPIN = {"name": "spin", "iterations": [{"rounds": 2, "beta_half": 100}]}
DPO = {"name": "dpo", "beta_full": 1}
SFT = {"name": "sft"}
SPIN_EXACT = {"name": "spin_exact", "iterations": [{"rounds": 2}]}


def sharpening(noise: str, **settings: Any) -> dict[str, Any]:
    """Excursions' settings, with this noise."""
    return {"name": "sharpening_rlhf", "beta_full": 1, "excursion": {"noise": noise, "stride": 40}, **settings}


SHARPENING_SFT = {"name": "sharpening_sft", "excursion": {"noise": "fresh"}}


class Workshop:
    """Makes groups as a rollout worker does that has just started."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.recipe, self.run_dir, self.policy = recipe, run_dir, Policy.from_recipe(recipe)
        self.chain = Chain(self.policy, recipe.sampler)
        self.maker = GroupMaker(self.chain, recipe, open_real_images(recipe, run_dir, self.policy))
        self._plan, self.num_steps = read_plan(recipe, run_dir), 0

    def tickets(self, round_: int = 0) -> list[Ticket]:
        return self._plan.round(round_, "digest")

    def make(self, ticket: Ticket) -> Made:
        self.num_steps = 0
        return self.maker.make(ticket, self._count)

    def _count(self) -> None:
        self.num_steps += 1


Open = Callable[..., Workshop]


@pytest.fixture(scope="module")
def open_workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens a workshop by the parts of a recipe: the one that was opened before, or one `anew`, with empty caches."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("makers")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    write_images(folder / "images")
    write_pairs(folder / "pairs")
    opened: dict[str, Workshop] = {}

    def open_(source: dict[str, Any], algorithm: dict[str, Any], *, anew: bool = False, **sampler: Any) -> Workshop:
        key = repr((source, algorithm, sampler))
        if key in opened and not anew:
            return opened[key]
        recipe = Recipe.model_validate(
            {
                "rounds": 2,
                "model": {"path": str(folder / "model"), "trainable": {"rank": 2}},
                "batch": {"num_groups": 12, "group_size": G},
                "sampler": {"num_steps": T, **sampler},
                "algorithm": algorithm,
                **source,
            }
        )
        run_dir = tmp_path_factory.mktemp("run")
        prepare_sources(recipe, run_dir, lambda words: None)
        opened[key] = Workshop(recipe, run_dir)
        return opened[key]

    with pytest.MonkeyPatch.context() as patch, library_cache(folder / "library-cache"):
        patch.chdir(folder)
        yield open_


# --- fields ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a group holds: dtypes and shapes, pictures to score at so many states, pictures decoded, denoising steps."""

    fields: dict[str, tuple[str, tuple[int, ...]]]
    num_scored: int | None = None
    num_states: int | None = None
    num_images: int = 0
    num_steps: int = 0


def trajectories(latent: str = "<f4") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The fields of whole trajectories."""
    return {"latents_GSCHW": (latent, (G, T + 1, *CHW)), "log_prob_GT": ("<f8", (G, T)), "scored_T": ("|b1", (T,))}


REAL = {"real_x0_CHW": ("<f4", CHW)}
OWN = {"x0_GCHW": ("<f4", (G, *CHW))}
EXCURSIONS = {
    "target_GCHW": ("<f4", (G, *CHW)),
    "states_GMCHW": ("<f4", (G, M, *CHW)),
    "state_timestep_M": ("<i8", (M,)),
}
TABLE = {
    "prompts, trajectories": (ON_PROMPTS, PRDP, Expected(trajectories(), G, None, G, T)),
    "prompts, images": (ON_PROMPTS, DPO, Expected(OWN, G, None, G, T)),
    "prompts, excursions": (ON_PROMPTS, sharpening("shared"), Expected(EXCURSIONS, G * M, M, G * M, T + M)),
    "prompts, excursions, final_x0": (
        ON_PROMPTS,
        sharpening("coupled", select_on="final_x0"),
        Expected(EXCURSIONS, G, None, G, T + M),
    ),
    "images, trajectories": (ON_IMAGES, SPIN_EXACT, Expected({**trajectories(), **REAL}, None, None, 0, T)),
    "images, images": (ON_IMAGES, SFT, Expected(REAL)),
    "images, self-play": (ON_IMAGES, SPIN, Expected({**OWN, **REAL}, None, None, G, T)),
    "images, self-play, scored": (ON_SCORED_IMAGES, SPIN, Expected({**OWN, **REAL}, G, None, G, T)),
    "images, excursions": (ON_SCORED_IMAGES, SHARPENING_SFT, Expected(EXCURSIONS, G * M, M, G * M, M)),
    "pairs, images": (ON_PAIRS, DPO, Expected({"pair_x0_2CHW": ("<f4", (2, *CHW))})),
    "pairs, self-play": (ON_PAIRS, SPIN, Expected({**OWN, **REAL}, None, None, G, T)),
    "pairs, trajectories": (ON_PAIRS, SPIN_EXACT, Expected({**trajectories(), **REAL}, None, None, 0, T)),
    "pairs, winners": (ON_PAIRS, SFT, Expected({"pair_x0_2CHW": ("<f4", (2, *CHW))})),
}


def with_all_states(workshop: Workshop) -> Ticket:
    """A ticket whose excursions have all their states; any for other contents."""
    for ticket in workshop.tickets():
        if len(workshop.make(ticket).arrays.get("state_timestep_M", range(M))) == M:
            return ticket
    raise AssertionError("all excursions of a round start below two strides")


@pytest.mark.parametrize(("source", "algorithm", "expected"), TABLE.values(), ids=TABLE)
def test_a_group_holds_what_its_source_and_its_algorithm_ask_for(
    open_workshop: Open, source: dict[str, Any], algorithm: dict[str, Any], expected: Expected
) -> None:
    workshop = open_workshop(source, algorithm)
    ticket = with_all_states(workshop)
    made = workshop.make(ticket)
    assert {name: (array.dtype.str, array.shape) for name, array in made.arrays.items()} == expected.fields
    assert all(np.isfinite(array).all() for array in made.arrays.values())
    assert made.num_states == expected.num_states
    assert made.num_images == expected.num_images
    assert made.num_evaluations == G * expected.num_steps
    assert workshop.num_steps == expected.num_steps
    assert workshop.maker.is_sampled(ticket) == (expected.num_steps > 0)
    if expected.num_scored is None:
        assert made.images is None
    else:
        assert made.images is not None
        assert (made.images.dtype, made.images.shape) == (np.uint8, (expected.num_scored, *IMAGE))


def test_latents_travel_in_the_wires_dtype_and_nothing_else_does(open_workshop: Open) -> None:
    half = {"wire_dtype": "float16"}
    made = {
        "prompts": open_workshop(ON_PROMPTS, PRDP, **half),
        "images": open_workshop(ON_IMAGES, SPIN, **half),
        "pairs": open_workshop(ON_PAIRS, DPO, **half),
        "excursions": open_workshop(ON_PROMPTS, sharpening("shared"), **half),
    }
    for workshop in made.values():
        for name, array in workshop.make(workshop.tickets()[0]).arrays.items():
            others = {"log_prob_GT": "<f8", "scored_T": "|b1", "state_timestep_M": "<i8"}
            assert array.dtype.str == others.get(name, "<f2")


def test_scores_go_by_the_names_that_groups_have_for_them() -> None:
    arrays = {"target_GCHW": np.zeros((2, *CHW), np.float32)}
    red, new = np.array([1, 2, 3, 4, 6, 8], np.float32), np.arange(6, dtype=np.float32)
    whole = Made(arrays, None, 3, 6).with_scores({"red": red, "new": new})
    assert whole.keys() == {*arrays, "state_reward_red_GM", "state_reward_new_GM"}
    assert whole["state_reward_red_GM"].tolist() == [[1, 2, 3], [4, 6, 8]]
    assert {array.dtype.str for array in whole.values()} == {"<f4"}
    assert Made(arrays, None, None, 2).with_scores({"red": red}) == {**arrays, "reward_red_G": red}
    assert Made(arrays, None, 3, 0).with_scores({}) == arrays


# --- the same whoever makes it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "algorithm"),
    [
        (ON_PROMPTS, PRDP),
        (ON_IMAGES, SPIN),
        (ON_PAIRS, DPO),
        (ON_PROMPTS, sharpening("coupled", select_on="final_x0")),
        (ON_SCORED_IMAGES, SHARPENING_SFT),
    ],
    ids=["trajectories", "self-play", "pairs", "excursions", "excursions of images"],
)
def test_a_ticket_has_one_answer_whoever_makes_it_and_whatever_was_made_before(
    open_workshop: Open, source: dict[str, Any], algorithm: dict[str, Any]
) -> None:
    one = open_workshop(source, algorithm)
    first = [one.make(ticket) for ticket in one.tickets()[:4]]
    other = open_workshop(source, algorithm, anew=True)
    second = [other.make(ticket) for ticket in other.tickets()[3:1:-1]]
    for made, again in zip(first[:1:-1], second, strict=True):
        assert {name: array.tobytes() for name, array in made.arrays.items()} == {
            name: array.tobytes() for name, array in again.arrays.items()
        }
        assert (made.images is None) == (again.images is None)
        if made.images is not None:
            assert made.images.tobytes() == again.images.tobytes()
        assert made.num_images == again.num_images


# --- real images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "algorithm"),
    [(ON_IMAGES, SFT), (ON_PAIRS, DPO), (ON_UNFLIPPED_PAIRS, DPO)],
    ids=["images", "pairs", "no"],
)
def test_a_flip_is_drawn_by_the_ticket_and_a_pairs_members_flip_alike(
    open_workshop: Open, source: dict[str, Any], algorithm: dict[str, Any]
) -> None:
    workshop = open_workshop(source, algorithm)
    recipe, policy = workshop.recipe, workshop.policy
    real = RealImages(recipe, workshop.run_dir, policy)
    manifest = Manifest.read(manifest_path(workshop.run_dir, 0))
    images = Images(recipe.data[0], manifest, policy.image_side)
    flips = set()
    for ticket in workshop.tickets():
        mean, _ = real.moments(ticket)
        matches = [
            torch.equal(mean, policy.encode(images.load(ticket.row, flipped=flipped))[0]) for flipped in (False, True)
        ]
        assert sum(matches) == 1
        flips.add(matches[1])
    assert flips == ({False, True} if recipe.data[0].flip else {False})


def standard_scores(latents: np.ndarray, moments: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """How many standard deviations latents are from the means of their posteriors."""
    mean, std = moments
    return (torch.from_numpy(latents.copy()).view_as(mean) - mean) / std


def assert_standard_normal(scores: torch.Tensor) -> None:
    """Mean and variance within 4 standard errors."""
    number = scores.numel()
    assert abs(float(scores.mean())) < 4 / number**0.5
    assert abs(float(scores.var()) - 1) < 4 * (2 / number) ** 0.5


def test_a_real_images_latents_are_drawn_from_its_posterior(open_workshop: Open) -> None:
    workshop = open_workshop(ON_PAIRS, DPO)
    real = RealImages(workshop.recipe, workshop.run_dir, workshop.policy)
    scores = torch.stack(
        [
            standard_scores(workshop.make(ticket).arrays["pair_x0_2CHW"], real.moments(ticket))
            for ticket in workshop.tickets()
        ]
    )
    assert_standard_normal(scores)
    assert len(scores.flatten(0, 1).flatten(1).unique(dim=0)) == 2 * len(scores)


def test_a_winner_is_first_whichever_column_it_is_in(open_workshop: Open) -> None:
    workshop = open_workshop(ON_UNFLIPPED_PAIRS, DPO)
    real = RealImages(workshop.recipe, workshop.run_dir, workshop.policy)
    rows = {ticket.row: ticket for ticket in workshop.tickets()}
    assert sorted(rows) == [0, 1, 3, 4]
    for row, ticket in rows.items():
        first, second = random_image(100 + row), random_image(200 + row)
        in_order = [first, second] if LABELS[row] == 1 else [second, first]
        assert torch.equal(real.moments(ticket)[0], workshop.policy.encode(np.stack(in_order))[0])
        assert ticket.prompt == CAPTIONS[row]


def test_self_play_plays_against_a_pairs_winner(open_workshop: Open) -> None:
    workshop = open_workshop(ON_PAIRS, SPIN)
    certain = torch.stack([torch.full(CHW, 1.0), torch.full(CHW, 2.0)]), torch.zeros(2, *CHW)
    maker = GroupMaker(workshop.chain, workshop.recipe, lambda ticket: certain)
    made = maker.make(workshop.tickets()[0], lambda: None)
    assert (made.arrays["real_x0_CHW"] == 1.0).all()


def test_self_plays_own_images_are_encoded_like_the_real_ones(open_workshop: Open) -> None:
    workshop = open_workshop(ON_IMAGES, SPIN)
    policy, chain = workshop.policy, workshop.chain
    real = RealImages(workshop.recipe, workshop.run_dir, policy)
    tickets = list({ticket.row: ticket for ticket in workshop.tickets()}.values())
    scores = []
    for ticket in tickets:
        made = workshop.make(ticket)
        drawn_GCHW = chain.sample(ticket.prompt, ticket.seeds_G).latents_GSCHW[:, -1]
        assert not np.array_equal(made.arrays["x0_GCHW"], drawn_GCHW.numpy())
        scores.append(standard_scores(made.arrays["x0_GCHW"], policy.encode(policy.decode(drawn_GCHW.float()))))
        scores.append(standard_scores(made.arrays["real_x0_CHW"], real.moments(ticket)))
    all_scores = torch.cat(scores)
    assert_standard_normal(all_scores)
    # Of 256 numbers each, so that 0.35 is more than 5 standard errors.
    assert all_scores.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.35, "two latents share their noise"


def test_a_rows_groups_are_the_same_throughout_an_iteration_of_self_play(open_workshop: Open) -> None:
    workshop = open_workshop(ON_IMAGES, SPIN)
    now = workshop.tickets(0)[0]
    again = next(ticket for ticket in workshop.tickets(1) if ticket.row == now.row)
    first, second = workshop.make(now), workshop.make(again)
    assert now.ticket_id != again.ticket_id
    assert all(np.array_equal(array, second.arrays[name]) for name, array in first.arrays.items())


# --- excursions -----------------------------------------------------------------------------------------


def signal_and_noise(workshop: Workshop, timestep: int) -> tuple[float, float]:
    """A and S of a training timestep."""
    alpha_bar = float(workshop.policy.alpha_bar[timestep])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


@pytest.mark.parametrize("noise", ["fresh", "shared", "coupled"])
def test_an_excursion_starts_from_an_own_sample_noised_as_the_recipe_says(open_workshop: Open, noise: str) -> None:
    workshop = open_workshop(ON_PROMPTS, sharpening(noise))
    ticket = workshop.tickets()[0]
    arrays = workshop.make(ticket).arrays
    drawn_GSCHW = workshop.chain.sample(ticket.prompt, ticket.seeds_G).latents_GSCHW.numpy()
    rows_equal_first = [np.array_equal(one, arrays["target_GCHW"][0]) for one in arrays["target_GCHW"]]
    assert rows_equal_first == ([True] * G if noise == "shared" else [True, False, False])
    assert np.array_equal(arrays["target_GCHW"], drawn_GSCHW[:, 0]) == (noise == "coupled")
    signal, spread = signal_and_noise(workshop, arrays["state_timestep_M"][0])
    expected = signal * drawn_GSCHW[:, -1] + spread * arrays["target_GCHW"]
    np.testing.assert_allclose(arrays["states_GMCHW"][:, 0], expected, rtol=1e-5, atol=1e-5)


def test_all_candidates_of_a_dataset_image_start_from_it(open_workshop: Open) -> None:
    workshop = open_workshop(ON_SCORED_IMAGES, SHARPENING_SFT)
    arrays = workshop.make(with_all_states(workshop)).arrays
    signal, spread = signal_and_noise(workshop, arrays["state_timestep_M"][0])
    start_GCHW = (arrays["states_GMCHW"][:, 0] - spread * arrays["target_GCHW"]) / signal
    np.testing.assert_allclose(start_GCHW[1:], np.stack([start_GCHW[0]] * (G - 1)), atol=1e-3)
    assert len({one.tobytes() for one in arrays["target_GCHW"]}) == G


def test_states_are_a_stride_apart_and_as_many_as_there_is_room_for(open_workshop: Open) -> None:
    workshop = open_workshop(ON_PROMPTS, {"name": "sharpening_sft", "excursion": {"noise": "fresh", "stride": 400}})
    numbers = set()
    for ticket in workshop.tickets():
        made = workshop.make(ticket)
        timesteps = made.arrays["state_timestep_M"].tolist()
        assert timesteps == [timesteps[0] - 400 * m for m in range(len(timesteps))]
        assert len(timesteps) == min(M, 1 + timesteps[0] // 400) == made.num_states
        assert made.arrays["states_GMCHW"].shape == (G, len(timesteps), *CHW)
        assert made.images is not None
        assert made.num_images == len(made.images) == G * len(timesteps)
        assert workshop.num_steps == T + len(timesteps)
        numbers.add(len(timesteps))
    assert numbers == {1, 2, 3}
