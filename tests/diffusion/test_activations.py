"""What the formulas say a pass holds, against every allocation of diffusers' own networks: tensors without data, so
that a network of any size is counted in seconds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protocol.activations import (
    MARGIN,
    decoder_passing,
    encoder_passing,
    latent_shape_CHW,
    num_text_tokens,
    num_tokens,
    transformer_activations,
    unet_activations,
)
from protocol.recipe import Lora

MIDDLE = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
DEEP = {
    **MIDDLE,
    "sample_size": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 4],
    "use_linear_projection": True,
}
HEADS = {"attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 32}
SD3 = {**HEADS, "sample_size": 64, "patch_size": 2, "in_channels": 16, "num_layers": 6, "caption_projection_dim": 256}
FLUX = {**HEADS, "in_channels": 64, "num_layers": 3, "num_single_layers": 6, "axes_dims_rope": (16, 24, 24)}


class Allocations(TorchDispatchMode):
    """Adds up the storages that are alive, but for those of a network's own weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        own = [*network.parameters(), *network.buffers()]
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self.now = self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def entries_of(make: Callable[[], Any], inputs: Callable[[], dict[str, Any]], how: str, *, full: bool) -> float:
    """Returns the largest number of bf16 entries that a pass over one latent has alive beside weights and gradients."""
    with FakeTensorMode():
        network = make().eval()
        if not full:
            network.requires_grad_(False)
            network.add_adapter(LoraConfig(r=4, target_modules=list(Lora().targets)))
        if how == "checkpointed":
            network.enable_gradient_checkpointing()
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        grads = nn.ParameterList(p.grad for p in network.parameters() if p.grad is not None)
        held = Allocations(nn.ModuleList([network, grads]))
        with held, torch.set_grad_enabled(how != "passing"):
            output = network(**inputs()).sample
            if how != "passing":
                output.square().mean().backward()
        return held.peak / 2


@pytest.fixture(autouse=True)
def _in_bf16_and_in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """peft moves an adapter to where it is already, which tensors without data cannot."""
    monkeypatch.setattr(nn.Module, "_apply", lambda self, *_, **__: self)
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kept", "checkpointed", "passing"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("config", [MIDDLE, DEEP], ids=["middle", "deep"])
def test_a_unets_activations_are_those_of_diffusers(config: dict[str, Any], how: str, full: bool) -> None:
    side = config["sample_size"]

    def inputs() -> dict[str, Any]:
        text = torch.zeros(1, 8, config["cross_attention_dim"])
        return {"sample": torch.zeros(1, 4, side, side), "timestep": torch.zeros(1), "encoder_hidden_states": text}

    counted = entries_of(lambda: UNet2DConditionModel(**config), inputs, how, full=full)
    assert getattr(unet_activations(config, full=full), how) == pytest.approx(counted, rel=MARGIN)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kept", "checkpointed", "passing"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", ["sd3", "sd3 with norms", "flux"])
def test_a_transformers_activations_are_those_of_diffusers(family: str, how: str, full: bool) -> None:
    config = FLUX if family == "flux" else {**SD3, "qk_norm": "rms_norm" if "norms" in family else None}
    kind = FluxTransformer2DModel if family == "flux" else SD3Transformer2DModel
    # FLUX's own configuration does not say how large its images are.
    sized = {"sample_size": 64, **config}
    num_text, (channels, height, width) = num_text_tokens(sized), latent_shape_CHW(sized)

    def inputs() -> dict[str, Any]:
        told = {
            "encoder_hidden_states": torch.zeros(1, num_text, HEADS["joint_attention_dim"]),
            "pooled_projections": torch.zeros(1, HEADS["pooled_projection_dim"]),
            "timestep": torch.zeros(1),
        }
        if family != "flux":
            return {**told, "hidden_states": torch.zeros(1, channels, height, width)}
        num_image = num_tokens(sized) - num_text
        ids = {"img_ids": torch.zeros(num_image, 3), "txt_ids": torch.zeros(num_text, 3)}
        return {**told, **ids, "hidden_states": torch.zeros(1, num_image, 64)}

    counted = entries_of(lambda: kind(**config), inputs, how, full=full)
    assert getattr(transformer_activations(sized, full=full), how) == pytest.approx(counted, rel=MARGIN)


def test_an_autoencoders_activations_are_those_of_diffusers() -> None:
    channels = (32, 64, 64)
    config = {"block_out_channels": channels, "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    with FakeTensorMode(), torch.no_grad():
        network = AutoencoderKL(**config, **blocks).eval()
        with Allocations(network) as decoding:
            network.decode(torch.zeros(1, 4, 16, 16))
        with Allocations(network) as encoding:
            network.encode(torch.zeros(1, 3, 64, 64))
    assert decoder_passing(config, 256) == pytest.approx(decoding.peak / 2, rel=MARGIN)
    assert encoder_passing(config, 256) == pytest.approx(encoding.peak / 2, rel=MARGIN)
