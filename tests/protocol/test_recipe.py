"""A recipe is checked before anything starts, and its errors say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from protocol.algorithms import Algorithm, Prdp
from protocol.derived import derived_numbers
from protocol.errors import ModelError, RecipeError
from protocol.recipe import Recipe
from protocol.recipe_file import dump_recipe, load_recipe, parse_recipe
from tests.protocol.model_files import write_model_files

TINY = "recipes/tiny_prdp.yaml"
FIXED = [
    "rounds=12",
    "sampler={num_steps: 10}",
    "algorithm.num_updates=4",
    "learner.micro_batch_size=64",
]
"""Settings that hand-computed numbers rest on, whatever the demo's tuning."""

DATA = ["prompts={}", "rewards=[]", "data=[{path: photos}]"]
"""Tickets start from a dataset's images alone."""

SCORED = "rewards=[{name: digit_alignment}]"

ALGORITHMS = tuple(get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(Algorithm)[0]))


def document(**changes: Any) -> dict[str, Any]:
    """The smallest PRDP recipe, with top-level keys changed."""
    whole = {
        "rounds": 3,
        "prompts": {"train": "prompts.txt"},
        "batch": {"num_groups": 8, "group_size": 4},
        "rewards": [{"name": "digit_alignment"}],
        "algorithm": {"name": "prdp", "kl_weight": 0.01, "clip_eps": 0.01},
    }
    return {**whole, **changes}


def prdp(**changes: Any) -> dict[str, Any]:
    """The algorithm's section, with keys changed."""
    return {"name": "prdp", "kl_weight": 0.01, "clip_eps": 0.01, **changes}


def dpo(**changes: Any) -> dict[str, Any]:
    """Another algorithm's."""
    return {"name": "dpo", "beta_full": 100.0, **changes}


def spin(**changes: Any) -> dict[str, Any]:
    """A third one's, of two iterations."""
    iterations = [{"rounds": 1, "beta_half": 100.0}, {"rounds": 2, "beta_half": 200.0}]
    return {"name": "spin", "iterations": iterations, **changes}


def prdp_of(recipe: Recipe) -> Prdp:
    """The settings of a recipe whose algorithm is PRDP."""
    assert isinstance(recipe.algorithm, Prdp)
    return recipe.algorithm


def refusal(changed: dict[str, Any]) -> str:
    """The message with which a document is refused."""
    with pytest.raises(RecipeError) as error:
        parse_recipe(changed, source="mine.yaml")
    return str(error.value)


def load(tmp_path: Path, *overrides: str, **changes: Any) -> Recipe:
    """Writes a recipe and reads it back with overrides."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(document(**changes)))
    return load_recipe(file, overrides)


def sections(kind: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    """A section and all sections below it."""
    found = [kind]
    for field in kind.model_fields.values():
        found += [inner for section in _sections_in(field.annotation) for inner in sections(section)]
    return found


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _sections_in(inner)]


# Typos.


@pytest.mark.parametrize(
    ("changes", "key", "closest", "legal"),
    [
        ({"learnr": {}}, "learnr", "learner", ("rewards", "batch", "sampler")),
        ({"learner": {"learning_rat": 1}}, "learner.learning_rat", "learning_rate", ("zero_stage",)),
        ({"algorithm": prdp(clip_epz=1)}, "algorithm.clip_epz", "clip_eps", ("kl_weight", "num_updates")),
        ({"algorithm": prdp(prdp=1)}, "algorithm.prdp", None, ("clip_eps", "kl_weight")),
        ({"algorithm": dpo(perception={})}, "algorithm.perception", None, ("beta_full", "pairs")),
        ({"algorithm": dpo(pairs={"ruel": "all_pairs"})}, "algorithm.pairs.ruel", "rule", ("threshold",)),
        ({"algorithm": spin(iterations=[{"round": 3}])}, "algorithm.iterations.0.round", "rounds", ("beta_half",)),
        ({"model": {"trainable": {"form": "lora", "rnk": 4}}}, "model.trainable.rnk", "rank", ("alpha", "targets")),
        ({"model": {"trainable": {"form": "full", "rank": 4}}}, "model.trainable.rank", None, ("form",)),
        ({"rewards": [{"name": "a", "wieght": 1}]}, "rewards.0.wieght", "weight", ("replicas", "kwargs")),
        (
            {"followers": [{"name": "other", "algorithm": dpo(bata_full=1)}]},
            *("followers.0.algorithm.bata_full", "beta_full", ("pairs",)),
        ),
        ({"full": 1}, "full", None, ("rounds", "model")),
    ],
    ids=str,
)
def test_a_typo_is_refused_with_the_key_the_closest_and_the_legal_ones(
    changes: dict[str, Any], key: str, closest: str | None, legal: tuple[str, ...]
) -> None:
    message = refusal(document(**changes))
    assert "mine.yaml" in message
    assert f"unknown key {key}. " in message
    assert (f"Did you mean {closest}?" in message) == (closest is not None)
    for name in legal:
        assert name in message.split("Legal keys here:")[1]


def test_the_legal_keys_are_those_of_the_algorithm_that_is_named() -> None:
    told = refusal(document(algorithm=prdp(beta_full=1)))
    assert told.split("Legal keys here: ")[1].rstrip(".") == ", ".join(sorted(Prdp.model_fields))


def test_a_bare_beta_is_refused() -> None:
    assert "unknown key algorithm.beta" in refusal(document(algorithm=prdp(beta=0.1)))


def test_all_errors_are_told_at_once() -> None:
    message = refusal(document(rounds=0, batch={"num_groups": 8}, lerner={}))
    for key in ("rounds", "batch.group_size is missing", "unknown key lerner"):
        assert key in message


def test_a_missing_key_is_named_with_what_it_means() -> None:
    message = refusal({key: value for key, value in document().items() if key != "rounds"})
    assert "rounds is missing: Rounds to train" in message


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_wrong_value_in_an_algorithm_is_told_by_its_key_alone(name: str) -> None:
    """Pydantic puts the name of the algorithm into the path of an error."""
    message = refusal(document(algorithm={"name": name, "num_updates": 0}))
    assert "  - algorithm.num_updates: Input should be greater than or equal to 1. Got: 0. K: passes" in message
    assert f"algorithm.{name}" not in message


@pytest.mark.parametrize(
    ("algorithm", "closest"),
    [
        ({"name": "grpo", "kl_weight": 1.0}, None),
        ({"name": "ncp-sft"}, "ncp_sft"),
        ({"name": "PRDP"}, None),
        ({"name": ["prdp"]}, None),
        ({"kl_weight": 1.0}, None),
        ({}, None),
    ],
    ids=str,
)
def test_an_unknown_algorithm_is_refused_with_the_legal_names(algorithm: dict[str, Any], closest: str | None) -> None:
    message = refusal(document(algorithm=algorithm))
    assert f"algorithm.name is none of {', '.join(ALGORITHMS)}. " in message
    assert f"Got: {algorithm!r}" in message
    assert closest is None or f"Did you mean {closest}?" in message


def test_an_unknown_training_form_is_refused_with_the_legal_ones() -> None:
    for trainable in ({"form": "qlora"}, 5, None):
        message = refusal(document(model={"trainable": trainable}))
        assert f"model.trainable.form is none of lora, full. Got: {trainable!r}" in message.replace(
            "Did you mean lora? ", ""
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": {"name": "dpo"}}, "  - algorithm: exactly one of beta_half"),
        ({"algorithm": {"name": "ncp_dpo", "beta_half": 1, "beta_full": 2}}, "they are 1.0 and 2.0."),
        ({"learner": {"offload_optimizer": True}}, "  - learner.offload_optimizer: true needs learner.zero_stage"),
        (
            {"learner": {"offload_parameters": True, "zero_stage": 2}},
            "  - learner.offload_parameters: true needs learner.zero_stage 3, but it is 2",
        ),
        ({"learner": {"ema": {"decay": 1.0}}}, "  - learner.ema.decay: "),
        ({"sampler": {"kernel": "ddpm", "eta": 0.5}}, "  - sampler: kernel ddpm is eta 1;"),
        (
            {"data": [{"path": "x", "pair_filter": "absolute_winners"}]},
            "  - data.0: pair_filter: absolute_winners needs kind: pairs",
        ),
        (
            {"algorithm": {"name": "ddpo", "min_count": 9, "buffer_size": 8}},
            "  - algorithm: min_count 9 is more than buffer_size 8 can ever hold.",
        ),
    ],
    ids=str,
)
def test_what_a_section_says_of_itself_is_told_once_and_with_its_place(changes: dict[str, Any], said: str) -> None:
    (_, line) = refusal(document(**changes)).splitlines()
    assert said in line
    assert "Got: {" not in line


def test_a_list_of_wrong_entries_is_not_called_too_short() -> None:
    assert "at least 1" not in refusal(document(algorithm=spin(iterations=[{"rounds": 3}])))
    assert "algorithm.iterations: Tuple should have at least 1" in refusal(document(algorithm=spin(iterations=[])))


# Numbers that cannot run: what, value, expected.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": {"num_groups": 8, "group_size": 1}}, ("batch.group_size: 1", "siblings", "at least 2")),
        ({"lag": -1}, ("lag:", "Got: -1", "greater than or equal to 0")),
        ({"algorithm": prdp(kl_weight=0)}, ("algorithm.kl_weight", "Got: 0", "greater than 0")),
        ({"algorithm": prdp(kl_weight=-2.5)}, ("algorithm.kl_weight", "Got: -2.5", "greater than 0")),
        ({"algorithm": prdp(kl_weight=float("nan"))}, ("algorithm.kl_weight", "nan")),
        ({"algorithm": prdp(clip_eps=-1)}, ("algorithm.clip_eps", "Got: -1", "greater than or equal to 0")),
        (
            {"algorithm": prdp(num_updates=0)},
            ("algorithm.num_updates", "Got: 0", "greater than or equal to 1"),
        ),
        ({"sampler": {"eta": 0}}, ("eta 0.0", "no step with a density", "eta above 0")),
        ({"sampler": {"num_steps": 1}}, ("1 steps", "no step with a density", "at least 2 steps")),
        ({"sampler": {"eta": 1.5}}, ("sampler.eta", "Got: 1.5", "less than or equal to 1")),
        ({"sampler": {"kernel": "ddpm", "eta": 0.5}}, ("kernel ddpm is eta 1", "kernel ddim")),
        (
            {"learner": {"world_size": 3}},
            ("8 groups do not divide evenly", "learner.world_size", "3 x 1", "a multiple of 3"),
        ),
        (
            {"learner": {"world_size": 2}, "algorithm": prdp(inner_minibatches=3)},
            ("8 groups do not divide evenly", "algorithm.inner_minibatches", "2 x 3", "a multiple of 6"),
        ),
        (
            {"learner": {"world_size": 2}, "redis": {"num_shards": 3}},
            ("redis.num_shards: 3", "not a multiple of learner.world_size 2"),
        ),
        ({"rewards": [{"name": "a", "weight": 0}]}, ("every weight is 0", "nothing is trained on")),
        ({"rewards": [{"name": "a"}, {"name": "./x.py:a"}]}, ("two rewards are called a",)),
        ({"rewards": [{"name": "mean"}]}, ("mean is a name that metrics use", "rename")),
        ({"rounds": "many"}, ("rounds", "valid integer", "'many'", "Rounds to train")),
    ],
)
def test_numbers_that_cannot_run_are_refused_with_what_value_and_expected(
    changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    message = refusal(document(**changes))
    for part in said:
        assert part in message


def test_a_window_may_be_absent_or_zero_but_must_be_chosen() -> None:
    for clip_eps in (None, 0, 1e-6):
        assert prdp_of(parse_recipe(document(algorithm=prdp(clip_eps=clip_eps)), source="")).clip_eps == clip_eps
    without = {key: value for key, value in prdp().items() if key != "clip_eps"}
    assert "algorithm.clip_eps is missing" in refusal(document(algorithm=without))


def test_a_clamped_last_step_counts_as_scored() -> None:
    one_step = {"num_steps": 1, "last_step": "clamp"}
    assert parse_recipe(document(sampler=one_step), source="").sampler.num_scored_steps == 1


# Files.


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml does not exist") as error:
        load_recipe("nowhere.yaml")
    assert TINY in str(error.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words", "", "a: [1,\n", "a: \x00"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml (has no keys|cannot be read)"):
        load_recipe(tmp_path / "bad.yaml")


# Overrides.


def test_overrides_reach_any_depth_and_lists(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "seed=5",
        "learner.learning_rate=1e-4",
        "rewards.0.weight=2",
        "rewards.0.kwargs.size=[1, 2]",
        "model.trainable={form: full}",
        "algorithm.clip_eps=null",
        "redis.url=redis://host:6379/0",
    )
    assert recipe.seed == 5
    assert recipe.learner.learning_rate == 1e-4
    assert recipe.rewards[0].weight == 2
    assert recipe.rewards[0].kwargs == {"size": [1, 2]}
    assert recipe.model.trainable.form == "full"
    assert prdp_of(recipe).clip_eps is None
    assert recipe.redis.url == "redis://host:6379/0"


def test_an_override_changes_nothing_else(tmp_path: Path) -> None:
    plain, changed = load(tmp_path), load(tmp_path, "sampler.num_steps=7")
    assert changed == plain.model_copy(update={"sampler": plain.sampler.model_copy(update={"num_steps": 7})})


def test_the_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "rounds=4", "rounds=9").rounds == 9
    assert load(tmp_path, "learner={world_size: 2}", "learner.world_size=4").learner.world_size == 4


@given(st.floats(1e-12, 1e12))
def test_numbers_in_exponent_notation_are_numbers(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    """YAML 1.1 reads 1e-4, without a dot, as text."""
    recipe = load(tmp_path_factory.mktemp("recipe"), f"algorithm.kl_weight={value:.0e}")
    assert prdp_of(recipe).kl_weight == float(f"{value:.0e}")


@pytest.mark.parametrize("override", ["", "rounds", "=3"])
def test_an_override_without_key_or_value_is_refused_with_an_example(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"key\.sub=value") as error:
        load(tmp_path, override)
    assert "learner.learning_rate=1e-4" in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learnr.learning_rate=1", "Did you mean learner?"),
        ("learner.learning_rat=1", "Did you mean learning_rate?"),
        ("rewards.3.weight=1", "a number from 0 to 0"),
        ("rewards.first.weight=1", "does not name an entry of a list"),
        ("rounds.a=1", "rounds is not a section"),
        ("rounds=[1", "not YAML"),
        ("rounds=", "rounds"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, override)
    assert said in str(error.value)


# The resolved recipe.


def test_a_dumped_recipe_loads_as_an_equal_one(tmp_path: Path) -> None:
    whole = load_recipe(
        TINY,
        [
            "learner.learning_rate=1e-5",
            "model.trainable={form: full}",
            "rewards.0.kwargs={text: 'ä: b', deep: [1, null]}",
            "rewards.0.resources={rollout: 0.5}",
            "algorithm.clip_eps=null",
            "evaluation.rewards=[{name: other}]",
        ],
    )
    for recipe in (load_recipe(TINY), whole):
        file = tmp_path / "resolved.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(file) == recipe
        assert dump_recipe(load_recipe(file)) == dump_recipe(recipe)


@pytest.mark.parametrize("path", ["rounds", "learner.world_size", "algorithm.kl_weight", "sampler.eta"])
def test_a_recipe_is_frozen(path: str) -> None:
    *parents, last = path.split(".")
    node: Any = load_recipe(TINY)
    for parent in parents:
        node = getattr(node, parent)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(node, last, 1)


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_every_field_has_a_description(kind: type[BaseModel]) -> None:
    assert kind.__doc__
    assert not [name for name, field in kind.model_fields.items() if not field.description]


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_every_section_is_frozen_and_closed(kind: type[BaseModel]) -> None:
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"


# What a resumed run may change, and what not.


@pytest.mark.parametrize(
    "override",
    [
        "rounds=100",
        "rollouts=7",
        "redis.url=redis://elsewhere",
        "redis.num_shards=4",
        "redis.claim_idle_s=5",
        "checkpoints.every_rounds=1",
        "checkpoints.keep_last=9",
        "evaluation.seed=1",
        "evaluation.rewards=[{name: other}]",
        "supervision.max_restarts=0",
        "learner.world_size=1",
        "learner.zero_stage=2",
        "rewards.0.replicas=3",
        "rewards.0.timeout_s=5",
        "rewards.0.max_attempts=5",
        "rewards.0.num_cpus=0.5",
        "rewards.0.resources={scoring: 1}",
    ],
)
def test_what_weights_do_not_depend_on_is_no_part_of_a_recipes_identity(override: str) -> None:
    assert load_recipe(TINY, [override]).identity() == load_recipe(TINY).identity()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "lag=1",
        "model.path=other",
        "model.trainable={form: lora, rank: 4}",
        "model.trainable={form: full}",
        "prompts.train=other.txt",
        "batch.num_groups=48",
        "batch.group_size=4",
        "sampler.kernel=ddpm",
        "sampler.num_steps=7",
        "sampler.eta=0.5",
        "sampler.guidance_scale=2",
        "sampler.last_step=clamp",
        "sampler.share_initial_noise=true",
        "sampler.wire_dtype=float16",
        "rewards.0.name=other",
        "rewards.0.weight=2",
        "rewards.0.kwargs={a: 1}",
        "rewards.0.threads=2",
        "rewards.0.num_gpus=1",
        "algorithm.kl_weight=1",
        "algorithm.clip_eps=null",
        "algorithm.num_updates=2",
        "algorithm.inner_minibatches=2",
        "algorithm.tie_policy=drop",
        "algorithm.loss_scale=none",
        "algorithm={name: policy_gradient, clip_range: null}",
        "behaviour=base",
        "followers=[{name: other, algorithm: {name: sft}}]",
        "prompts.weight=2",
        "prompts.column=title",
        "prompts.max_prompts=9",
        "prompts={train: assets/prompts_train.txt, held_out_share: 0.1}",
        "learner.decay=linear",
        "learner.warmup_steps=1",
        "learner.precision=bf16",
        "learner.micro_batch_size=1",
        "learner.learning_rate=1",
        "learner.threads=2",
        "rollout_worker.threads=2",
        "rollout_worker.num_gpus=1",
    ],
)
def test_what_weights_depend_on_is_part_of_a_recipes_identity(override: str) -> None:
    assert load_recipe(TINY, [override]).identity() != load_recipe(TINY).identity()


def learning_from_data(*overrides: str) -> Recipe:
    """The tiny recipe's model on regression to a dataset's images."""
    return load_recipe(TINY, ["algorithm={name: sft}", *DATA, *overrides])


@pytest.mark.parametrize(
    "override",
    [
        "data.0.path=others",
        "data.0.flip=true",
        "data.0.max_items=9",
        "data=[{path: photos}, {path: more}]",
        "algorithm.min_tau=1",
    ],
)
def test_data_is_part_of_a_recipes_identity(override: str) -> None:
    assert learning_from_data(override).identity() != learning_from_data().identity()


def test_the_number_of_rounds_is_part_of_the_identity_where_learning_rates_follow_from_it() -> None:
    for plan in ("learner.warmup_steps=9", "learner.decay=constant"):
        assert load_recipe(TINY, [plan, "rounds=3"]).identity() == load_recipe(TINY, [plan, "rounds=4"]).identity()
    decaying = [load_recipe(TINY, ["learner.decay=linear", f"rounds={rounds}"]).identity() for rounds in (3, 4)]
    assert decaying[0] != decaying[1]
    assert decaying[0] == load_recipe(TINY, ["learner.decay=linear", "rounds=3", "rollouts=9"]).identity()


def test_a_followers_learning_rates_count_as_well() -> None:
    constant = "followers=[{name: other, algorithm: {name: sft}}]"
    decaying = "followers=[{name: other, algorithm: {name: sft}, learner: {decay: linear}}]"
    for followers, is_fixed in ((constant, False), (decaying, True)):
        identities = [load_recipe(TINY, [followers, f"rounds={rounds}"]).identity() for rounds in (3, 4)]
        assert (identities[0] != identities[1]) == is_fixed


def test_the_identity_of_self_play_has_the_rounds_of_its_iterations() -> None:
    identities = []
    for last in (2, 3):
        iterations = f"[{{rounds: 1, beta_half: 9}}, {{rounds: {last}, beta_half: 9}}]"
        self_play = [f"algorithm={{name: spin, iterations: {iterations}}}", f"rounds={1 + last}"]
        identities.append(learning_from_data(*self_play).identity())
    assert [identity["rounds"] for identity in identities] == [3, 4]
    assert identities[0] != identities[1]


# Derived numbers, by hand for the tiny recipe: 24 groups of 8, 10 steps of which 9 are scored, 12 rounds of 4
# updates, 2 ranks, micro-batches of 64, latents of 4 x 8 x 8 in float32.


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """As much of a model as derived numbers read."""
    write_model_files(tmp_path / "model", side=8)
    (tmp_path / "prompts.txt").write_text("# a comment\na red seven\n\na blue one\n")
    return tmp_path / "model"


def derive(model_folder: Path, *overrides: str) -> dict[str, str]:
    """The tiny recipe's derived numbers on the given model."""
    prompts = model_folder.parent / "prompts.txt"
    return derived_numbers(
        load_recipe(TINY, [f"model.path={model_folder}", f"prompts.train={prompts}", *FIXED, *overrides])
    )


def test_derived_numbers_are_those_computed_by_hand(model_folder: Path) -> None:
    group_bytes = 8 * (11 * 256 * 4 + 10 * 8 + 2 * 4)
    assert derive(model_folder) == {
        "tickets start from": "2 prompts",
        "prompts held out": "72",
        "groups a round": "24, 12 a rank",
        "optimizer steps": "48 (4 a round)",
        "images sampled a round, at most": "192 (24 groups of 8), 2304 in all",
        "network evaluations to sample a round": "1920",
        "scored steps of a trajectory": "9 of 10",
        "micro-batches of a pass, a rank": "14",
        "network evaluations to learn a round, at most": f"{192 * 9 * 17}",
        "versions kept": "1",
        "latent shape, entries": "(4, 8, 8), 256",
        "a group on the wire, at most": f"{group_bytes / 2**20:.2f} MiB",
        "in flight at most": f"{24 * group_bytes / 2**20:.1f} MiB",
        "beta of the trajectory KL, sum_sum": f"{1e-2 / (256 * 9):.3g}",
        "window as a mean shift, in sigma an entry": "0.16",
    }


def test_derived_numbers_follow_the_recipe(model_folder: Path) -> None:
    doubled = derive(model_folder, "lag=1", "sampler.guidance_scale=5", "sampler.last_step=clamp")
    assert doubled["versions kept"] == "2"
    assert doubled["network evaluations to sample a round"] == "3840"
    assert doubled["scored steps of a trajectory"] == "10 of 10"
    assert doubled["network evaluations to learn a round, at most"] == f"{192 * 10 * 2 * 17}"
    summed = derive(model_folder, "algorithm.latent_reduce=latent_sum", "algorithm.time_reduce=time_sum")
    assert summed["beta of the trajectory KL, sum_sum"] == "0.01"
    assert "window as a mean shift, in sigma an entry" not in derive(model_folder, "algorithm.clip_eps=null")


def test_equal_windows_in_other_reductions_are_the_same_mean_shift(model_folder: Path) -> None:
    name = "window as a mean shift, in sigma an entry"
    mean = derive(model_folder, "algorithm.clip_eps=0.01")[name]
    assert derive(model_folder, "algorithm.latent_reduce=latent_sum", "algorithm.clip_eps=2.56")[name] == mean
    for kind in ("policy_gradient", "ddpo"):
        assert derive(model_folder, f"algorithm={{name: {kind}, clip_range: 0.01, num_updates: 4}}")[name] == mean


@pytest.mark.parametrize(
    ("overrides", "learning", "steps_an_image", "latents_a_group"),
    [
        # A backward pass counts as two forwards. Of trajectories, 9 of 10 steps are scored; all 11 states are sent.
        (["algorithm={name: policy_gradient, clip_range: 1}"], 192 * 9 * 4, 10, 8 * 11),
        (["algorithm={name: policy_gradient, clip_range: 1, kl_coef: 1}"], 192 * 9 * 5, 10, 8 * 11),
        (["algorithm={name: ddpo, num_updates: 3}"], 192 * 9 * 12, 10, 8 * 11),
        # Of images one forward with a backward each; pairs twice that, and the reference's errors.
        (["algorithm={name: sft}"], 24 * 3, 10, 8),
        (["algorithm={name: cpo, beta_full: 1}"], 24 * 6, 10, 8),
        (["algorithm={name: dpo, beta_full: 1, pairs: {rule: all_pairs}}"], 24 * 28 * 8, 10, 8),
        # One image of the dataset, or a pair of them, goes with a group; what is not sampled is only that.
        (["algorithm={name: sft}", *DATA], 24 * 3, 0, 1),
        (["algorithm={name: dpo, beta_full: 1}", *DATA, "data.0.kind=pairs"], 24 * 8, 0, 2),
        (["algorithm={name: spin, iterations: [{rounds: 12, beta_half: 1}]}", *DATA], 192 * 8, 10, 8 + 1),
        (["algorithm={name: spin_exact, iterations: [{rounds: 12}]}", *DATA], 2 * 192 * 9 * 5, 10, 8 * 11 + 1),
        # Excursions of three states and their noise, from samples or from a dataset's images.
        (["algorithm={name: sharpening_sft, excursion: {noise: fresh}}"], 24 * 3 * 3, 13, 8 * 4),
        (["algorithm={name: sharpening_rlhf, beta_full: 1, excursion: {noise: fresh}}"], 24 * 3 * 8, 13, 8 * 4),
        (["algorithm={name: sharpening_sft, excursion: {noise: fresh}}", *DATA, SCORED], 24 * 3 * 3, 3, 8 * 4 + 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_algorithms_numbers_are_those_counted_by_hand(
    model_folder: Path, overrides: list[str], learning: int, steps_an_image: int, latents_a_group: int
) -> None:
    numbers = derive(model_folder, *overrides)
    assert numbers["network evaluations to learn a round, at most"] == str(learning)
    sampling = numbers.get("network evaluations to sample a round")
    assert sampling == (f"{192 * steps_an_image}" if steps_an_image else None)
    # Rewards and log-probabilities are small beside the latents.
    size = float(numbers["a group on the wire, at most"].split()[0])
    assert size == pytest.approx(latents_a_group * 1024 / 2**20, rel=0.05, abs=0.006)


def test_tickets_are_told_to_start_from_each_source(model_folder: Path) -> None:
    mixture = ["algorithm={name: sft}", "data=[{path: photos}, {path: duels, kind: pairs}]"]
    assert derive(model_folder, *mixture)["tickets start from"] == "2 prompts, images of photos, pairs of duels"


def test_what_is_probably_not_meant_is_noted(model_folder: Path) -> None:
    assert "note" not in derive(model_folder)
    noted = derive(model_folder, "algorithm={name: cpo, beta_full: 1, sft_weight: 0}")["note"]
    assert noted == "algorithm.sft_weight is 0: nothing bounds the loser's error"


def test_betas_on_errors_are_told_an_entry_in_one_convention(model_folder: Path) -> None:
    name = "beta per latent entry"
    assert derive(model_folder, "algorithm={name: dpo, beta_full: 512}")[name] == "2"
    assert derive(model_folder, "algorithm={name: dpo, beta_half: 512}")[name] == "1"
    iterations = "[{rounds: 4, beta_half: 512}, {rounds: 8, beta_half: 1024}]"
    assert derive(model_folder, f"algorithm={{name: spin, iterations: {iterations}}}", *DATA)[name] == "1, 2"


def test_a_model_of_the_hub_is_not_looked_up(model_folder: Path) -> None:
    numbers = derive(model_folder, "model.path=CompVis/stable-diffusion-v1-4")
    assert numbers["latent shape"] == "known once CompVis/stable-diffusion-v1-4 is on disk"


def test_a_missing_prompt_file_is_refused_with_its_name() -> None:
    with pytest.raises(ModelError, match=r"nothing\.txt does not exist"):
        derived_numbers(load_recipe(TINY, ["prompts.train=nothing.txt"]))
