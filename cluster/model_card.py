"""The model card of an export: what was trained, from what, how, how well, and code that loads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.evaluate import Comparison, Evaluation
from learner.checkpoint import Weights
from protocol import __version__
from protocol.derived import facts_of
from protocol.paths import model_source
from protocol.recipe import Full, Recipe, Sampler
from protocol.recipe_file import dump_recipe
from protocol.roles import Reward
from protocol.starting_lora import LORA_FILE
from protocol.tickets import Source

Form = Literal["lora", "pipeline"]

DENOISERS = {"unet": "U-Net", "transformer": "transformer"}
BEFORE, AFTER = "images/before.png", "images/after.png"
SHOWN_PROMPTS = 5

METHODS = {
    "prdp": "PRDP, proximal reward difference prediction (arXiv 2402.08714)",
    "policy_gradient": "group-centred policy gradient (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)",
    "ddpo": "DDPO, denoising diffusion policy optimization (arXiv 2305.13301)",
    "spin": "SPIN-Diffusion, self-play fine-tuning (arXiv 2402.10210)",
    "spin_exact": "SPIN-Diffusion, self-play fine-tuning, on whole trajectories (arXiv 2402.10210)",
    "sft": "denoising regression (the loss of arXiv 2006.11239)",
    "dpo": "Diffusion-DPO (arXiv 2311.12908)",
    "cpo": "Diffusion-CPO (arXiv 2406.17636)",
    "ncp_sft": "denoising regression in noise-conditioned perceptual space (arXiv 2406.17636)",
    "ncp_dpo": "Diffusion-DPO in noise-conditioned perceptual space (arXiv 2406.17636)",
    "ncp_cpo": "Diffusion-CPO in noise-conditioned perceptual space (arXiv 2406.17636)",
    "sharpening_sft": "Diffusion-Sharpening, SFT variant (arXiv 2502.12146)",
    "sharpening_rlhf": "Diffusion-Sharpening, RLHF variant (arXiv 2502.12146)",
}
"""What an algorithm's name in a recipe means to a reader, and where it was published."""


@dataclass(frozen=True)
class Card:
    """What a card tells: `Card(recipe, form="lora", version=20, weights="live", digest="9f86...",
    base_digest="d081...", sources=(Source.of_prompts(("a red seven", ...)),), evaluation=None, has_images=True,
    part="unet")`. `sources` are those of the run's tickets, `part` is what the pipeline calls its denoiser; without an
    evaluation of this version, or images, the card says nothing of them."""

    recipe: Recipe
    form: Form
    version: int
    weights: Weights
    digest: str
    base_digest: str
    sources: tuple[Source, ...]
    evaluation: Evaluation | None
    has_images: bool
    part: str

    @property
    def weights_words(self) -> str:
        """Which of a version's weights they are."""
        if self.weights == "live" or self.recipe.learner.ema is None:
            return "as trained"
        return f"a moving average of those trained, of decay {self.recipe.learner.ema.decay:g}"


def model_card(card: Card) -> str:
    """Returns README.md, as the Hugging Face hub and people read it."""
    sections = {
        "How to load it": _loading(card),
        "Before and after": _images() if card.has_images else "",
        "What it was trained on": _data(card),
        "Rewards": _rewards(card.recipe),
        "Held-out evaluation": _evaluation(card),
        "Recipe": _fenced(dump_recipe(_publishable(card.recipe)), "yaml"),
        "Digests": _digests(card),
    }
    bodies = [f"## {title}\n\n{body.strip()}\n" for title, body in sections.items() if body]
    return "\n".join([_front_matter(card), _introduction(card), *bodies])


def _front_matter(card: Card) -> str:
    name = card.recipe.algorithm.name
    kind = ["lora"] if card.form == "lora" else []
    facts: dict[str, Any] = {
        "base_model": _base_name(card.recipe) if card.recipe.model.path == "embedded" else card.recipe.model.path,
        "base_model_relation": "adapter" if card.form == "lora" else "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        # The base model's, which its files do not tell.
        "license": "unknown",
        "tags": ["diffusers", "text-to-image", *kind, "sfumato", name],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def _introduction(card: Card) -> str:
    recipe, trainable = card.recipe, card.recipe.model.trainable
    if isinstance(trainable, Full):
        what = f"A whole pipeline, all weights of its {DENOISERS[card.part]} fine-tuned from"
    elif card.form == "lora":
        what = f"A LoRA adapter of rank {trainable.rank} for"
    else:
        what = f"A whole pipeline, a LoRA adapter of rank {trainable.rank} fused into the {DENOISERS[card.part]} of"
    embedded = recipe.model.path == "embedded"
    base = "the digits model that comes with sfumato" if embedded else f"`{recipe.model.path}`"
    return (
        f"# {_base_name(recipe)}, fine-tuned by {recipe.algorithm.name}\n\n"
        f"{what} {base}, trained with sfumato by {_linked(METHODS[recipe.algorithm.name])}. Version {card.version}: "
        f"each round of {recipe.batch.num_groups} groups of {recipe.batch.group_size} images made one. "
        f"Its weights are {card.weights_words}.\n\n"
        f"{_start(card)}"
        "The base model's licence, and what it asks of derived models, holds here too: name it in the first lines of "
        "this file before you publish it.\n"
    )


def _start(card: Card) -> str:
    """Says what LoRA the run started from, and where that is now."""
    lora = card.recipe.model.lora
    if lora is None:
        return ""
    is_file = card.form == "lora" and not isinstance(card.recipe.model.trainable, Full)
    inside = "holds both, for the plain base model: do not load the other one too" if is_file else "has it added in"
    return f"The run started from the LoRA `{lora.path}` at scale {lora.scale:g}; what is here {inside}.\n\n"


def _base_name(recipe: Recipe) -> str:
    return Path(model_source(recipe.model.path)).name


def _loading(card: Card) -> str:
    recipe, sampler = card.recipe, card.recipe.sampler
    half = {"fp32": "", "bf16": ", torch_dtype=torch.bfloat16", "fp16": ", torch_dtype=torch.float16"}
    dtype = half[recipe.learner.precision]
    load = [f"pipeline = DiffusionPipeline.from_pretrained(folder{dtype})"]
    if card.form == "lora":
        base = model_source(recipe.model.path)
        load = [
            f"pipeline = DiffusionPipeline.from_pretrained({base!r}{dtype})",
            f"pipeline.load_lora_weights(folder, weight_name={LORA_FILE!r})",
        ]
    lines = [
        "import torch",
        f"from diffusers import {'' if sampler.is_flow else 'DDIMScheduler, '}DiffusionPipeline",
        "",
        'folder = "."  # where this file is',
        *load,
        *_scheduler(sampler),
        "images = pipeline(",
        f"    {card.sources[0].prompts[0]!r},",
        f"    num_inference_steps={sampler.num_steps},",
        *(f"    {name}={value!r}," for name, value in pipeline_arguments(recipe).items()),
        "    generator=torch.Generator().manual_seed(0),",
        ").images",
        'images[0].save("image.png")',
    ]
    return _fenced("\n".join(lines), "python")


def _scheduler(sampler: Sampler) -> list[str]:
    """Lines that give a pipeline the run's scheduler: DDPM ancestral is DDIM with eta 1 (arXiv 2010.02502, Eq. 16). No
    scheduler of diffusers has the SDEs of flows; its own takes the steps of their ODE."""
    if sampler.is_flow:
        return ["# The run's own steps, but for the noise in them, which is for training."]
    return [
        "# The run's own sampler.",
        "pipeline.scheduler = DDIMScheduler.from_config(",
        "    pipeline.scheduler.config, clip_sample=False, "
        f"set_alpha_to_one={sampler.last_step == 'unscored'}, thresholding=False",
        ")",
    ]


def pipeline_arguments(recipe: Recipe) -> dict[str, object]:
    """Returns guidance, noise and size as a pipeline of diffusers is told them."""
    sampler, resolution = recipe.sampler, recipe.model.resolution
    arguments: dict[str, object] = {"guidance_scale": sampler.guidance_scale}
    facts = facts_of(recipe)
    if facts and facts.pipeline == "FluxPipeline" and not facts.embeds_guidance and sampler.guidance_scale != 1:
        arguments = {"true_cfg_scale": sampler.guidance_scale, "negative_prompt": ""}
    if not sampler.is_flow:
        arguments["eta"] = sampler.eta
    if resolution is not None:
        arguments |= {"height": resolution, "width": resolution}
    return arguments


def _images() -> str:
    return (
        "The same prompts and the same noise, base model and this one.\n\n"
        f"| before | after |\n|---|---|\n| ![before]({BEFORE}) | ![after]({AFTER}) |"
    )


def _data(card: Card) -> str:
    recipe = card.recipe
    paths = [recipe.prompts.train] if recipe.prompts.train is not None else []
    names = [*paths, *(dataset.path for dataset in recipe.data)]
    parts = [_source(name, source) for name, source in zip(names, card.sources, strict=True)]
    if recipe.prompts.held_out is not None:
        parts.append(f"Never trained on, for evaluation: the prompts of `{recipe.prompts.held_out}`.")
    if recipe.prompts.held_out_share is not None:
        parts.append(f"Never trained on, for evaluation: {recipe.prompts.held_out_share:.1%} of `{paths[0]}`.")
    return "\n\n".join(parts)


def _source(name: str, source: Source) -> str:
    what = {"prompts": "prompts", "images": "images with captions", "pairs": "preference pairs"}[source.kind]
    prompts = list(dict.fromkeys(source.prompts))[:SHOWN_PROMPTS]
    return f"{len(source.prompts)} {what} of `{name}`, among them:\n\n" + _fenced("\n".join(prompts), "text")


def _rewards(recipe: Recipe) -> str:
    rows = [*_reward_rows(recipe.rewards, "trained on")]
    rows += _reward_rows(recipe.firewall.rewards if recipe.firewall else (), "held out, by the firewall")
    rows += _reward_rows(recipe.evaluation.rewards, "held out, by evaluation")
    if not rows:
        return "None: it learnt from its data alone."
    head = ["| reward | weight | normalised | use |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _reward_rows(rewards: Sequence[Reward], use: str) -> Iterator[str]:
    for reward in rewards:
        weight = f"{reward.weight:g}" if use == "trained on" else ""
        yield f"| `{reward.name}` | {weight} | {reward.normalise.how if weight else ''} | {use} |"


def _evaluation(card: Card) -> str:
    result = card.evaluation
    if result is None:
        return ""
    trained = {"mean", *(reward.label for reward in card.recipe.rewards)}
    head = [
        f"Version {result.version} against its base on {result.num_prompts} prompts x {result.images_per_prompt} "
        f"images of `{result.prompts}`, the same noise for both (seed {result.seed}). Errors are over prompts; "
        "a win is an image that scores above the base's.\n",
        "| reward | trained on | base | tuned | difference | wins |",
        "|---|---|---|---|---|---|",
    ]
    rows = [
        _evaluation_row(label, row, is_trained=label in trained)
        for label, row in result.rewards.items()
        if not (label == "mean" and len(result.rewards) == 2)  # The sum of one reward says nothing new.
    ]
    return "\n".join([*head, *rows])


def _evaluation_row(label: str, row: Comparison, *, is_trained: bool) -> str:
    name = "trained sum" if label == "mean" else f"`{label}`"
    numbers = [f"{part.mean:.3f} ± {part.standard_error:.3f}" for part in (row.base, row.tuned, row.difference)]
    wins = f"{100 * row.win_rate.mean:.1f} ± {100 * row.win_rate.standard_error:.1f} %"
    return f"| {' | '.join([name, 'yes' if is_trained else 'no', *numbers, wins])} |"


def _digests(card: Card) -> str:
    lora = card.recipe.model.lora
    rows = {
        "version": f"{card.version}, its weights {card.weights_words}",
        "weights": f"`{card.digest}`",
        f"base model's {DENOISERS[card.part]}{', and LoRA' if lora else ''}": f"`{card.base_digest}`",
        **({"LoRA that it started from, its file": f"`{lora.digest}`"} if lora else {}),
        "exported by": f"sfumato {__version__}, diffusers {installed('diffusers')}",
    }
    where = f"as the run published it (`sfumato digest RUN --version {card.version}`)"
    if card.weights == "average":
        where = "as the run's checkpoint keeps its average (`average_digest`)"
    table = "\n".join(["| what | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    precision = "fp32" if lora else card.recipe.learner.precision
    return (
        f"{table}\n\nSHA-256 of names, dtypes, shapes and bytes of what was trained, {where}, and of the base model's "
        f"{DENOISERS[card.part]} in {precision}. The run is a function of code, recipe and seed. Nothing here is for "
        "resuming it."
    )


def _publishable(recipe: Recipe) -> Recipe:
    """The recipe without the address of the Redis server that its run used."""
    return recipe.model_copy(update={"redis": recipe.redis.model_copy(update={"url": None})})


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _fenced(text: str, language: str) -> str:
    """A block of code, between fences longer than any that the text itself holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
