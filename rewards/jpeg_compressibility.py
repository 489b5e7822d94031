"""How small an image is as a JPEG (DDPO, Black et al., arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

QUALITY = 95


def jpeg_kilobytes(image_HW3: np.ndarray) -> float:
    """Returns the size of an image's JPEG at quality 95, in units of 1000 bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


class JpegCompressibility:
    """Minus the size of the JPEG in kB: more is better."""

    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> list[float]:
        """Returns N scores; the prompts do not matter."""
        return [-jpeg_kilobytes(image) for image in images_NHW3]
