"""What a network is told besides states and timesteps: prompts as tensors, for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """N prompts as a model family encodes them. Worked examples, of one prompt each:

    Stable Diffusion 1.x     Conditioning(text_NLE (1, 77, 768))
    Stable Diffusion XL      Conditioning(text_NLE (1, 77, 2048), pooled_NP (1, 1280), size_N6 (1, 6))
    Stable Diffusion 3       Conditioning(text_NLE (1, 333, 4096), pooled_NP (1, 2048))
    FLUX.1-dev               Conditioning(text_NLE (1, 512, 4096), pooled_NP (1, 768), guidance_N (1,))

    `pooled_NP` is the whole prompt in one vector, `size_N6` original height and width, top and left of the crop, and
    target height and width in pixels, `guidance_N` the guidance scale, fp32.
    """

    text_NLE: Tensor
    pooled_NP: Tensor | None = None
    size_N6: Tensor | None = None
    guidance_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text_NLE)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """Returns the rows of an index."""
        return self._each(lambda tensor: tensor[index])

    def expand(self, num: int) -> Conditioning:
        """Returns one row as so many equal ones, without copying it."""
        return self._each(lambda tensor: tensor.expand(num, *tensor.shape[1:]))

    def repeat_interleave(self, num: int) -> Conditioning:
        """Returns each row so many times, one after the other."""
        return self._each(lambda tensor: tensor.repeat_interleave(num, 0))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Returns the rows of all parts, which are of one family."""

        def joined(name: str) -> Tensor | None:
            present = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
            return torch.cat(present) if present else None

        return Conditioning(torch.cat([part.text_NLE for part in parts]), *(joined(name) for name in OPTIONAL))

    def guided(self, scale: float) -> Conditioning:
        """Returns the same prompts with a guidance scale that the network is told."""
        return replace(self, guidance_N=torch.full((len(self),), scale, device=self.text_NLE.device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        optional = [getattr(self, name) for name in OPTIONAL]
        return Conditioning(change(self.text_NLE), *(None if each is None else change(each) for each in optional))


OPTIONAL = ("pooled_NP", "size_N6", "guidance_N")
