"""Measures what the embedded base model and classifier can do: `python -m assets.measure` writes `card.json`.

All images come from DDIM with eta 1, as in training with rewards, and are judged by the classifier. Some ten minutes
on one core. Every number of the data card, `README.md`, is from here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Generator

from assets.digits import ASSETS, Variation, load_strokes, random_scene, to_uint8
from assets.make_base import BASE
from assets.make_classifier import HOW, accuracy
from diffusion.chain import Chain
from diffusion.families.stable_diffusion import StableDiffusion
from diffusion.policy import Policy
from protocol.recipe import Full, Sampler
from rewards.digit_alignment import CLASSIFIER_PATH, DigitAlignment, load_classifier

CARD = ASSETS / "card.json"
PARTS = ("digit", "colour", "ground")
NUM_PROMPTS, IMAGES_PER_PROMPT = 72, 8
SETTINGS = [(guidance, steps) for guidance in (1.0, 3.0) for steps in (4, 20)]


def measure_base(policy: Policy, judge: DigitAlignment) -> dict[str, dict[str, float]]:
    """Returns shares of right images and the mean reward for training and held-out prompts, by setting."""
    found = {}
    for guidance, steps in SETTINGS:
        chain = Chain(policy, Sampler(num_steps=steps, guidance_scale=guidance))
        for name in ("train", "held_out"):
            images, prompts = _draw(chain, read_prompts(name))
            found[f"{name}, guidance {guidance:g}, {steps} steps"] = _judge(judge, images, prompts)
    return found


def read_prompts(name: str) -> list[str]:
    """Returns 72 prompts, evenly spaced in prompts_<name>.txt: all of the held-out ones."""
    lines = (ASSETS / f"prompts_{name}.txt").read_text().splitlines()
    return lines[:: len(lines) // NUM_PROMPTS][:NUM_PROMPTS]


def _draw(chain: Chain, prompts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Draws 8 images a prompt; prompt k has the seeds 8k to 8k + 7 under every setting."""
    images = []
    for number, prompt in enumerate(prompts):
        seeds_G = range(number * IMAGES_PER_PROMPT, (number + 1) * IMAGES_PER_PROMPT)
        latents_GSCHW = chain.sample(prompt, seeds_G).latents_GSCHW
        images.append(chain.policy.decode(latents_GSCHW[:, -1]))
    return np.concatenate(images), [prompt for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]


def _judge(judge: DigitAlignment, images_NHW3: np.ndarray, prompts: list[str]) -> dict[str, float]:
    right_N3 = judge.is_right(images_NHW3, prompts)
    rates = dict(zip(PARTS, right_N3.mean(axis=0), strict=True))
    rates |= {"all_three": right_N3.all(axis=1).mean(), "reward": judge(images_NHW3, prompts).mean()}
    return {name: round(float(rate), 3) for name, rate in rates.items()}


def measure_classifier() -> dict[str, object]:
    """Returns shares of held-out real digits judged rightly, rendered plainly and with training's variation."""
    classifier = load_classifier(CLASSIFIER_PATH)
    return {
        "num_held_out_digits": len(load_strokes(training=False).digit_N),
        "right_on_held_out_digits": _named(accuracy(classifier, training=False)),
        "right_on_held_out_digits_with_blur_and_noise": _named(accuracy(classifier, training=False, how=HOW)),
    }


@torch.inference_mode()
def measure_autoencoder(policy: Policy, judge: DigitAlignment, num_images: int = 2000) -> dict[str, object]:
    """Returns how much held-out real digits lose on their way through the autoencoder."""
    assert policy.vae is not None
    images, shown_N3 = random_scene(num_images, False, Variation(), Generator().manual_seed(0))
    parts = [policy.vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(100)]
    decoded = np.concatenate([policy.decode(part * policy.vae.config.scaling_factor) for part in parts])
    latents = torch.cat(parts) * policy.vae.config.scaling_factor
    right_N3 = judge.likeliest(decoded) == shown_N3.numpy()
    error = np.abs(decoded.astype(float) - to_uint8(images).astype(float)).mean() / 255
    return {
        "mean_absolute_error": round(float(error), 4),
        "latent_standard_deviation": round(float(latents.std()), 3),
        "right_on_held_out_digits_after_decoding": _named(right_N3.mean(axis=0).tolist()),
    }


def measure_sizes(policy: Policy) -> dict[str, object]:
    """Returns numbers of parameters and sizes in bytes."""
    family = policy.family
    assert isinstance(family, StableDiffusion)
    networks = {"unet": policy.denoiser, "vae": policy.vae, "text_encoder": family.text_encoder}
    networks["classifier"] = load_classifier(CLASSIFIER_PATH)
    return {
        "num_parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        "vocabulary": len(family.tokenizer),
        "size_bytes": {
            "digits-base": _size_bytes(BASE.rglob("*")),
            "digit-classifier.safetensors": _size_bytes([CLASSIFIER_PATH]),
        },
    }


def _named(rates: list[float]) -> dict[str, float]:
    return {name: round(rate, 4) for name, rate in zip(PARTS, rates, strict=True)}


def _size_bytes(files: Iterator[Path] | list[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Measures everything and writes the card."""
    torch.set_num_threads(1)
    policy, judge = Policy(str(BASE), trainable=Full(form="full"), seed=0), DigitAlignment()
    card = {
        "sizes": measure_sizes(policy),
        "classifier": measure_classifier(),
        "autoencoder": measure_autoencoder(policy, judge),
        "base": measure_base(policy, judge),
    }
    CARD.write_text(json.dumps(card, indent=2) + "\n")
    print(CARD.read_text())


if __name__ == "__main__":
    main()
