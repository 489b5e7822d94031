"""Trains the embedded base model from nothing: `python -m assets.make_base`. About an hour on one core.

In order: prompts, tokenizer, autoencoder, then U-Net and text model together on cached latents. Each part is a real
diffusers or transformers class, saved in the layout of Stable Diffusion.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Generator, Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.digits import ASSETS, Variation, random_scene, split_scenes, write_prompt
from rewards.digit_alignment import COLOURS, IMAGE_SIZE, Said

SEED = 0
BASE = ASSETS / "digits-base"
WIDTH = 64
MAX_TOKENS = 16
NUM_SCENES = 40_000
AUTOENCODER_STEPS = 1000
PHASES = (("rise", 1501), ("fall", 1500), ("level", 2000), ("fall", 1200))
"""Learning-rate phases of the U-Net. Colours are learnt in the first thousand steps; digits only in the third phase."""
PEAK_RATE = 1e-3
BATCH_SIZE = 64
PROMPT_DROPOUT = 0.1
SWAPPED_PROMPTS = 0.4
"""Share of prompts, at the end of training, whose two colours are exchanged. Large models learn from captions that bind
colours to the wrong things, and mix them up; this one does too, on purpose, and leaves a reward something to teach."""
SWAPPED_STEPS = 2400
SWAPPED_RATE = 7e-4
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def write_prompts() -> None:
    """Writes the two prompt files."""
    for name, scenes in zip(("train", "held_out"), split_scenes(), strict=True):
        lines = [write_prompt(scene) for scene in scenes]
        (ASSETS / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n")


def make_tokenizer() -> CLIPTokenizer:
    """Trains a byte-level BPE vocabulary in CLIP's form (words end in </w>) on all prompts."""
    sentences = [write_prompt(scene) for scenes in split_scenes() for scene in scenes]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return _clip_tokenizer(sorted(alphabet), [" ".join(pair) for pair in model["merges"]])


def _clip_tokenizer(alphabet: list[str], merges: list[str]) -> CLIPTokenizer:
    """CLIP's order of the vocabulary: bytes, bytes that end a word, merges, special tokens."""
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    words += [merge.replace(" ", "") for merge in merges] + list(SPECIAL)
    folder = BASE / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)


def train_autoencoder() -> AutoencoderKL:
    """Trains 32x32x3 -> 4x8x8 with an L1 loss and a light pull to a unit Gaussian."""
    torch.manual_seed(SEED)
    noise = Generator().manual_seed(SEED)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    optimizer = torch.optim.AdamW(autoencoder.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, AUTOENCODER_STEPS)
    for step in range(AUTOENCODER_STEPS):
        images, _ = random_scene(32, True, Variation(), noise)
        pixels = images * 2 - 1
        posterior = autoencoder.encode(pixels).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=noise)).sample
        loss = functional.l1_loss(decoded, pixels) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        _descend(loss, optimizer, schedule)
        _say("autoencoder", step, loss)
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def cache_latents(autoencoder: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Returns latents (N, 4, 8, 8) of unit variance and scenes (N, 3), training combinations only."""
    noise, training = Generator().manual_seed(SEED + 1), _scene_table()
    latents, scenes = [], []
    for _ in range(NUM_SCENES // 500):
        images, said_N3 = random_scene(500, True, Variation(), noise)
        latents.append(autoencoder.encode(images * 2 - 1).latent_dist.sample(generator=noise))
        scenes.append(said_N3)
    said_N3 = torch.cat(scenes)
    kept_N = training[tuple(said_N3.unbind(1))] >= 0
    latents_NCHW = torch.cat(latents)[kept_N]
    autoencoder.register_to_config(scaling_factor=float(1 / latents_NCHW.std()))
    return latents_NCHW * autoencoder.config.scaling_factor, said_N3[kept_N]


def _scene_table() -> Tensor:
    """Returns (10, 9, 9): the number of a training combination, or -1."""
    table = torch.full((10, len(COLOURS), len(COLOURS)), -1)
    for number, scene in enumerate(split_scenes()[0]):
        table[scene] = number
    return table


def make_networks(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Returns the U-Net and the text model, untrained. Attention only at 4x4 keeps a forward pass cheap."""
    torch.manual_seed(SEED + 2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return unet, text_model


def train_unet(pipeline: StableDiffusionPipeline, latents_NCHW: Tensor, said_N3: Tensor, phase: int) -> None:
    """Trains noise prediction with prompt dropout for guidance, in place.

    Each phase has an optimizer and noise of its own, so that one can be done again from what the one before saved.
    """
    noise = Generator().manual_seed(SEED + 3 + phase)
    tokens_NL, empty_1L = _tokens_of(pipeline.tokenizer, said_N3), _tokens(pipeline.tokenizer, [""])

    def write(pick_N: Tensor) -> Tensor:
        dropped_N = torch.rand(BATCH_SIZE, generator=noise) < PROMPT_DROPOUT
        return torch.where(dropped_N[:, None], empty_1L, tokens_NL[pick_N])

    shape, num_steps = PHASES[phase]
    _train(pipeline, latents_NCHW, write, noise, shape, num_steps)


def mix_colours_up(pipeline: StableDiffusionPipeline, latents_NCHW: Tensor, said_N3: Tensor) -> None:
    """Trains on with prompts of which a share has its colours exchanged, in place."""
    noise = Generator().manual_seed(SEED + 4)
    right_NL, swapped_NL = (_tokens_of(pipeline.tokenizer, each_N3) for each_N3 in (said_N3, _swap_colours(said_N3)))
    empty_1L = _tokens(pipeline.tokenizer, [""])

    def write(pick_N: Tensor) -> Tensor:
        swapped_N1, dropped_N1 = torch.rand(2, BATCH_SIZE, 1, generator=noise)
        said_NL = torch.where(swapped_N1 < SWAPPED_PROMPTS, swapped_NL[pick_N], right_NL[pick_N])
        return torch.where(dropped_N1 < PROMPT_DROPOUT, empty_1L, said_NL)

    _train(pipeline, latents_NCHW, write, noise, "mix", SWAPPED_STEPS)


def _train(
    pipeline: StableDiffusionPipeline,
    latents_NCHW: Tensor,
    write: Callable[[Tensor], Tensor],
    noise: Generator,
    shape: str,
    num_steps: int,
) -> None:
    """Trains noise prediction (Ho et al., arXiv 2006.11239) along one learning-rate phase, in place. `write` returns
    the prompts' tokens, (N, L), of the latents picked; it draws from `noise` too."""
    optimizer = _unfreeze(pipeline)
    schedule = _schedule(optimizer, shape, num_steps)
    for step in range(num_steps):
        pick_N = torch.randint(len(latents_NCHW), (BATCH_SIZE,), generator=noise)
        embedding_NLE = pipeline.text_encoder(write(pick_N))[0]
        loss = _noise_error(pipeline, latents_NCHW[pick_N], embedding_NLE, noise)
        _descend(loss, optimizer, schedule)
        _say(f"unet, {shape},", step, loss)


def _unfreeze(pipeline: StableDiffusionPipeline) -> torch.optim.Optimizer:
    parameters = [*pipeline.unet.train().parameters(), *pipeline.text_encoder.train().parameters()]
    return torch.optim.AdamW(parameters, PEAK_RATE, weight_decay=0.01)


def _swap_colours(said_N3: Tensor) -> Tensor:
    """Exchanges digit's colour and ground's, except where that would say a held-out prompt."""
    swapped_N3 = said_N3[:, [0, 2, 1]]
    is_training_N = _scene_table()[tuple(swapped_N3.unbind(1))] >= 0
    return torch.where(is_training_N[:, None], swapped_N3, said_N3)


def _schedule(optimizer: torch.optim.Optimizer, shape: str, num_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if shape == "rise":
        # The rising 30 % of a one-cycle schedule.
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, round(num_steps / 0.3002))
    if shape == "fall":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    if shape == "mix":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, SWAPPED_RATE, num_steps, pct_start=0.1)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _noise_error(
    pipeline: StableDiffusionPipeline, latents_NCHW: Tensor, embedding_NLE: Tensor, noise: Generator
) -> Tensor:
    timestep_N = torch.randint(1000, (len(latents_NCHW),), generator=noise)
    target_NCHW = torch.randn(latents_NCHW.shape, generator=noise)
    noisy_NCHW = pipeline.scheduler.add_noise(latents_NCHW, target_NCHW, timestep_N)
    predicted = pipeline.unet(noisy_NCHW, timestep_N, encoder_hidden_states=embedding_NLE).sample
    return functional.mse_loss(predicted, target_NCHW)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, but with timesteps counted from the end ("trailing").

    Its usual spacing ends on timestep 1. The step that lands there has next to no variance, and the gradient of its
    log-density drowns that of all others in noise.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def _tokens_of(tokenizer: CLIPTokenizer, said_N3: Tensor) -> Tensor:
    return _tokens(tokenizer, [write_prompt(Said(*said)) for said in said_N3.tolist()])


def _tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    tokens: Tensor = tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    schedule.step()


def _say(what: str, step: int, loss: Tensor) -> None:
    if step % 200 == 0:
        print(f"{what} step {step} loss {loss.item():.4f}", flush=True)


def save(pipeline: StableDiffusionPipeline) -> None:
    """Writes the pipeline in diffusers layout."""
    for part in (pipeline.unet, pipeline.text_encoder):
        part.eval()
    pipeline.save_pretrained(BASE)


def main() -> None:
    """Makes everything, in order; what is on disk can be used from the first save on."""
    torch.set_num_threads(1)
    write_prompts()
    tokenizer = make_tokenizer()
    autoencoder = train_autoencoder()
    latents_NCHW, said_N3 = cache_latents(autoencoder)
    unet, text_model = make_networks(tokenizer)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_model,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    for phase in range(len(PHASES)):
        train_unet(pipeline, latents_NCHW, said_N3, phase)
        save(pipeline)
    mix_colours_up(pipeline, latents_NCHW, said_N3)
    save(pipeline)


if __name__ == "__main__":
    main()
