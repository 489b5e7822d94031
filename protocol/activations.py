"""How much a network's forward and backward pass hold, from its `config.json` alone: entries of feature maps, to be
multiplied by the bytes of the dtype.

    kept      what a graph holds of one latent until its backward pass is done
    passing   what is alive at once of one latent where no graph is kept

The counts follow what autograd keeps of each layer of diffusers' blocks, with attention that stores no matrix of
scores (`scaled_dot_product_attention`'s flash and memory-efficient kernels). Held against every allocation of
diffusers' own networks at full size (docs/memory.md) they are within MARGIN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Config = Mapping[str, Any]

MARGIN = 0.2
"""By how much an estimate of activations may be off."""

ATTENTION_LAYER = 28
"""Widths a token that a graph keeps of a U-Net's transformer layer: 12 of two attentions with their norms, 16 of the
gated feed-forward part, which is 4 widths wide and twice that before its gate."""

AROUND_ATTENTION = 3
"""Widths that are kept around a transformer's layers: of its norm and of its two projections."""

ATTENTION_BACKWARD = 8
"""Widths that a transformer layer's backward pass makes: the gradient before the gate."""

ATTENTION_PASSING, ATTENTION_PASSING_ADAPTED = 22, 31
"""Widths alive in a transformer layer and around it without a graph. An adapter's part is made, scaled and added: three
arrays of the width before the gate instead of one."""

FLUX_JOINT, FLUX_SINGLE, FLUX_BACKWARD = (19.5, 28.1), (14.2, 25.1), (12.9, 5.4)
"""Widths a token of FLUX's two kinds of layers, with adapters and with all weights trained, and what the backward pass
makes at once. Counted in bf16; fp32, where rotated queries and keys are no wider than others, keeps up to a fifth
less."""

SD3_LAYER, SD3_NORM, SD3_BACKWARD = (16.5, 21.1), (6.0, 8.1), (7.1, 3.5)
"""The same of Stable Diffusion 3's layers, and what they keep more where they normalise queries and keys."""

AROUND_TRANSFORMER, FLUX_PASSING, SD3_PASSING = (1.5, 3.0), (16.0, 16.0), (15.2, 10.8)
"""Widths a token that are kept before and behind a transformer's layers, and what passes without a graph."""

FLUX_TEXT_TOKENS, SD3_TEXT_TOKENS = 512, 333
"""Prompts are T5's 512 tokens, or CLIP's 77 and T5's 256."""


@dataclass(frozen=True)
class Activations:
    """Entries of one latent, one branch of guidance. Stable Diffusion 1.5 with adapters: `Activations(kept=4.6e8,
    checkpointed=1.2e8, passing=4.4e7)`; `checkpointed` is `kept` with gradient checkpointing."""

    kept: int
    checkpointed: int
    passing: int


@dataclass(frozen=True)
class _Unit:
    """What gradient checkpointing forgets and computes again as one, in entries: its input, what a graph keeps of it,
    what its backward pass makes, what is alive in it without a graph; what is kept around it, which is not forgotten;
    the skip connections that wait meanwhile."""

    entering: int = 0
    kept: int = 0
    backward: int = 0
    passing: int = 0
    outside: int = 0
    waiting: int = 0


def unet_activations(config: Config, *, full: bool) -> Activations:
    """Returns what diffusers' UNet2DConditionModel holds; `full` where all weights are trained, not adapters alone."""
    units = list(_unet_units(config, full=full))
    outside = sum(unit.outside for unit in units)
    return Activations(
        kept=sum(unit.kept for unit in units) + outside + max(unit.backward for unit in units),
        checkpointed=_checkpointed(units),
        passing=max(unit.passing + unit.waiting for unit in units),
    )


def _checkpointed(units: Sequence[_Unit]) -> int:
    """The backward pass computes a unit again while the inputs of all before it wait; those behind it are gone."""
    waiting = accumulate(unit.entering + unit.outside for unit in units)
    return max(held + unit.kept + unit.backward for held, unit in zip(waiting, units, strict=True))


def _unet_units(config: Config, *, full: bool) -> Iterator[_Unit]:
    is_linear = config.get("use_linear_projection", False)
    # A frozen convolution keeps its input, a frozen linear layer does not.
    around = AROUND_ATTENTION - 2 * (is_linear and not full)
    attention_passing = ATTENTION_PASSING if full else ATTENTION_PASSING_ADAPTED
    channels = config["block_out_channels"]
    num_layers = _each(config["layers_per_block"], len(channels))
    depths = _each(config.get("transformer_layers_per_block", 1), len(channels))
    area = math.prod(_pair(config["sample_size"]))

    def stage(kind: str, entering: int, level: int) -> Iterator[_Unit]:
        """A residual block, and a transformer where the block's kind has one."""
        map_ = channels[level] * area
        yield _residual(entering * area, map_, sum(skips))
        for layer in range(depths[level] if "CrossAttn" in kind else 0):
            outside = around * map_ if layer == 0 else 0
            kept, backward = ATTENTION_LAYER * map_, ATTENTION_BACKWARD * map_
            yield _Unit(map_, kept, backward, attention_passing * map_, outside, sum(skips))

    skips, width, last = [channels[0] * area], channels[0], len(channels) - 1
    for level, kind in enumerate(config["down_block_types"]):
        for _ in range(num_layers[level]):
            yield from stage(kind, width, level)
            width = channels[level]
            skips.append(width * area)
        if level < last:
            yield _Unit(outside=width * area)
            area //= 4
            skips.append(width * area)
    yield from stage("CrossAttn", width, last)
    yield from stage("", width, last)
    for level, kind in zip(range(last, -1, -1), config["up_block_types"], strict=True):
        num_blocks = num_layers[level] + 1
        arriving = skips[-num_blocks:]
        for skip in reversed(arriving):
            yield from stage(kind, width + skip // area, level)
            width = channels[level]
        del skips[-num_blocks:]
        if level > 0:
            area *= 4
            yield _Unit(outside=width * area, passing=2 * width * area, waiting=sum(skips))


def _residual(entering: int, leaving: int, waiting: int) -> _Unit:
    """Two norms, activations and convolutions, each of which keeps its input."""
    passing = max(3 * entering, 2 * entering + leaving, entering + 3 * leaving)
    return _Unit(entering, 3 * (entering + leaving), entering + leaving, passing, waiting=waiting)


def transformer_activations(config: Config, *, full: bool) -> Activations:
    """Returns what diffusers' SD3Transformer2DModel or FluxTransformer2DModel holds."""
    map_ = config["num_attention_heads"] * config["attention_head_dim"] * num_tokens(config)
    kept = [layer[full] for layer in _transformer_layers(config)]
    both = (FLUX_BACKWARD, FLUX_PASSING) if _is_flux(config) else (SD3_BACKWARD, SD3_PASSING)
    backward, passing = (widths[full] for widths in both)
    around = AROUND_TRANSFORMER[full]
    return Activations(
        kept=round(map_ * (sum(kept) + around + backward)),
        # Of all layers but one the input alone is there. The first to be computed again, the last, meets most of them.
        checkpointed=round(map_ * (len(kept) + around + kept[-1] + backward)),
        passing=round(map_ * passing),
    )


def _transformer_layers(config: Config) -> list[tuple[float, float]]:
    """Returns the widths a token that each layer keeps, with adapters and with all weights trained."""
    if _is_flux(config):
        return [FLUX_JOINT] * config["num_layers"] + [FLUX_SINGLE] * config["num_single_layers"]
    norm = SD3_NORM if config.get("qk_norm") is not None else (0.0, 0.0)
    return [(SD3_LAYER[0] + norm[0], SD3_LAYER[1] + norm[1])] * config["num_layers"]


def _is_flux(config: Config) -> bool:
    return "num_single_layers" in config


def num_tokens(config: Config) -> int:
    """Returns a transformer's tokens of image and prompt."""
    height, width = _pair(config["sample_size"])
    if _is_flux(config):
        return height * width // 4 + FLUX_TEXT_TOKENS
    return height * width // int(config["patch_size"]) ** 2 + SD3_TEXT_TOKENS


def num_text_tokens(config: Config) -> int:
    """Returns how many of them are the prompt's."""
    return FLUX_TEXT_TOKENS if _is_flux(config) else SD3_TEXT_TOKENS


def latent_shape_CHW(config: Config) -> tuple[int, int, int]:
    """Returns (C, H, W) of a network's latents. FLUX's are packed, two by two."""
    num_channels = config["in_channels"] // 4 if _is_flux(config) else config["in_channels"]
    return num_channels, *_pair(config["sample_size"])


def decoder_passing(config: Config, latent_area: int) -> int:
    """Returns what an autoencoder's decoder has alive of one image: three maps of its second width, at the image's
    size."""
    channels = config["block_out_channels"]
    return 3 * int(channels[min(1, len(channels) - 1)]) * _image_area(config, latent_area)


def encoder_passing(config: Config, latent_area: int) -> int:
    """Returns what an autoencoder's encoder has alive of one image: five maps of its first width."""
    return 5 * int(config["block_out_channels"][0]) * _image_area(config, latent_area)


def _image_area(config: Config, latent_area: int) -> int:
    num_halvings: int = len(config["block_out_channels"]) - 1
    return latent_area * 1 << 2 * num_halvings


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, Sequence) else (size, size)


def _each(value: Any, number: int) -> list[int]:
    return list(value) if isinstance(value, Sequence) else [value] * number
