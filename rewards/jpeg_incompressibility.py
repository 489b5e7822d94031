"""How large an image is as a JPEG (DDPO, Black et al., arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

import numpy as np

from rewards.jpeg_compressibility import jpeg_kilobytes


class JpegIncompressibility:
    """The size of the JPEG in kB: more is better."""

    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> list[float]:
        """Returns N scores; the prompts do not matter."""
        return [jpeg_kilobytes(image) for image in images_NHW3]
