"""Trains the digit and colour classifier behind the alignment reward: `python -m assets.make_classifier`.

Real handwritten digits of the training split, in random colours, a little moved, turned, blurred and noised, so that
what a VAE decodes is judged fairly. About three minutes on one core.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import functional

from assets.digits import Variation, random_scene
from rewards.digit_alignment import CLASSIFIER_PATH, DigitClassifier

SEED = 0
NUM_STEPS = 2500
BATCH_SIZE = 64
PEAK_RATE = 3e-3
PLAIN = Variation()
HOW = Variation(height=(22.0, 28.0), shift=2.5, colour=0.04, turn=0.15, blur=1.0, noise=0.06)


def train() -> DigitClassifier:
    """Returns the trained classifier."""
    torch.manual_seed(SEED)
    classifier, noise = DigitClassifier(), Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, NUM_STEPS)
    for step in range(NUM_STEPS):
        images, said_N3 = random_scene(BATCH_SIZE, True, HOW, noise)
        loss = classification_loss(classifier(images * 2 - 1), said_N3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    return classifier.eval()


def classification_loss(logits: tuple[Tensor, Tensor, Tensor], said_N3: Tensor) -> Tensor:
    """Sum of the three heads' cross-entropies; smoothed, so that the reward keeps a slope where it is sure."""
    losses = [functional.cross_entropy(head, said_N3[:, k], label_smoothing=0.02) for k, head in enumerate(logits)]
    return torch.stack(losses).sum()


@torch.inference_mode()
def accuracy(
    classifier: DigitClassifier, *, training: bool, how: Variation = PLAIN, num_images: int = 4000
) -> list[float]:
    """Shares of digits, digit colours and grounds that are right, on digits of one split in random colours."""
    images, said_N3 = random_scene(num_images, training, how, Generator().manual_seed(SEED + 1))
    guesses = torch.stack([head.argmax(1) for head in classifier(images * 2 - 1)], dim=1)
    return [float(share) for share in (guesses == said_N3).double().mean(0)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = train()
    CLASSIFIER_PATH.parent.mkdir(exist_ok=True)
    save_file(made.state_dict(), CLASSIFIER_PATH)
    print("held-out accuracy (digit, colour, ground):", accuracy(made, training=False))
