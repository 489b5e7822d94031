"""Real images: what a ticket that starts from a dataset's row is made of, as moments of its latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from actors.datasets import Images
from actors.latents import LatentCache, Moments
from diffusion.fingerprint import fingerprint
from diffusion.policy import Policy
from diffusion.weights import weights_digest
from protocol.datasets import Manifest
from protocol.paths import manifest_path
from protocol.recipe import Recipe
from protocol.seeds import Purpose, derive_seed
from protocol.tickets import Ticket

CACHE = "cache/latents"


class RealImages:
    """The datasets of a recipe, read and encoded; what was encoded once is kept in the run directory."""

    def __init__(self, recipe: Recipe, run_dir: Path, policy: Policy) -> None:
        """Opens the datasets. Raises RecipeError or RunDirError."""
        assert policy.vae is not None, "this policy was loaded without its autoencoder"
        self._recipe, self._first = recipe, int(recipe.prompts.train is not None)
        base = {
            "fingerprint": fingerprint(policy.device, policy.base_digest),
            "autoencoder": weights_digest(policy.vae.state_dict()),
        }
        self._images = [
            Images(dataset, Manifest.read(manifest_path(run_dir, number)), policy.image_side)
            for number, dataset in enumerate(recipe.data)
        ]
        self._caches = [
            LatentCache(run_dir / CACHE, {**base, "pixels": images.description}, policy.encode)
            for images in self._images
        ]

    def moments(self, ticket: Ticket) -> Moments:
        """Returns mean and standard deviation of the latents of a ticket's image, or of its pair with the winner first:
        (1 or 2, C, h, w) fp32 on the CPU. A flip is drawn by the ticket, and is one for a pair."""
        number = ticket.source - self._first
        images = self._images[number]
        flipped = self._recipe.data[number].flip and derive_seed(ticket.seeds_G[0], Purpose.FLIP) % 2 == 1
        keys = images.keys(ticket.row, flipped=flipped)
        return self._caches[number].moments(keys, lambda: images.load(ticket.row, flipped=flipped))


RealMoments = Callable[[Ticket], Moments]
"""Moments of a dataset ticket's latents."""


def open_real_images(recipe: Recipe, run_dir: Path, policy: Policy) -> RealMoments | None:
    """Returns what reads a recipe's datasets, or None where it has none."""
    return RealImages(recipe, run_dir, policy).moments if recipe.data else None
