"""A LoRA's header alone tells what it is for, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import ModelError
from protocol.lora_file import LayerSize, Role, check_fits, read_layers, split_name
from protocol.tensor_header import read_shapes
from tests.loras import header_file

BASE = {
    "unet": {
        "conv_in.weight": (320, 4, 3, 3),
        "down_blocks.1.attentions.0.proj_in.weight": (640, 640, 1, 1),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 768),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.bias": (640,),
    },
    "text_encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
}
"""Some weights of Stable Diffusion 1.5."""

TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(name: str, *, inputs: int = 768, outputs: int = 640, rank: int = 8) -> dict[str, tuple[int, ...]]:
    """A layer by the name of its down matrix, in any layout."""
    up = name
    for down_word, up_word in (("lora_A", "lora_B"), ("lora_down", "lora_up"), (".down.", ".up.")):
        up = up.replace(down_word, up_word)
    return {name: (rank, inputs), up: (outputs, rank)}


@pytest.mark.parametrize(
    ("name", "part", "module", "role"),
    [
        (f"unet.{TO_K}.lora_A.weight", "unet", TO_K, "down"),
        (f"unet.{TO_K}.lora.up.weight", "unet", TO_K, "up"),
        ("unet.a.attn1.processor.to_out_lora.down.weight", "unet", "a.attn1.to_out.0", "down"),
        ("unet.a.attn1.processor.to_q_lora.up.weight", "unet", "a.attn1.to_q", "up"),
        ("unet.a.attn1.processor.to_q_lora.down.weight.alpha", "unet", "a.attn1.to_q", "alpha"),
        ("unet.a.proj_in.alpha", "unet", "a.proj_in", "alpha"),
        ("transformer.proj_out.lora_B.weight", "transformer", "proj_out", "up"),
        (
            "text_encoder.text_model.encoder.b.self_attn.to_out_lora.up.weight",
            "text_encoder",
            "encoder.b.self_attn.out_proj",
            "up",
        ),
        (
            "text_encoder_2.encoder.b.self_attn.to_v_lora.up.weight",
            "text_encoder_2",
            "encoder.b.self_attn.v_proj",
            "up",
        ),
        (
            "text_encoder.text_model.encoder.b.fc1.lora_linear_layer.down.weight",
            "text_encoder",
            "encoder.b.fc1",
            "down",
        ),
    ],
)
def test_a_name_tells_part_module_and_role(name: str, part: str, module: str, role: Role) -> None:
    assert split_name(name) == (part, module, role)


@pytest.mark.parametrize(
    "name", ["vae.a.lora_A.weight", "a.lora_A.weight", "unet.a.weight", "unet.a.lora_A.bias", "alpha"]
)
def test_any_other_name_tells_nothing(name: str) -> None:
    assert split_name(name) is None


def test_sizes_are_those_of_the_modules_that_layers_are_for(tmp_path: Path) -> None:
    shapes = {
        **pair(f"unet.{TO_K}.lora_A.weight"),
        "lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (320, 4, 1, 1),
        "lora_unet_conv_in.alpha": (),
        **pair("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", outputs=3072),
    }
    layers = read_layers(header_file(tmp_path / "a.safetensors", shapes), "unet")
    assert layers == {
        ("unet", TO_K): LayerSize(8, 768, 640),
        ("unet", "conv_in"): LayerSize(4, 36, 320),
        ("text_encoder", "encoder_layers_0_mlp_fc1"): LayerSize(8, 768, 3072),
    }
    check_fits(tmp_path / "a.safetensors", layers, BASE)


ORIGINAL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
RESNET = "lora_unet_input_blocks_4_0_in_layers_2.lora_down.weight"


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (pair(f"unet.{TO_K}.lora_A.weight", inputs=2048), ["made for another base", TO_K, "2048 -> 640", "768 -> 640"]),
        (pair(ORIGINAL, inputs=2048), ["made for another base", "2048 -> 640", "768 -> 640"]),
        (pair(f"unet.{TO_K}.elsewhere.lora_A.weight"), ["made for another base", "a known module"]),
        (pair("lora_unet_single_blocks_0_linear1.lora_down.weight"), ["made for another base", "a known module"]),
        (
            pair(f"unet.{TO_K}.lora_A.weight") | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
            ["text_encoder_2", "a LoRA for unet, text_encoder"],
        ),
        (pair("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"), ["has no layer for the unet"]),
        (pair("transformer.proj_out.lora_A.weight"), ["has no layer for the unet", "layers for transformer"]),
        ({}, ["not a safetensors file"]),
        ({f"unet.{TO_K}.lora_A.weight": (8, 768)}, ["only half of layer", "Got: 'down'"]),
        (
            {f"unet.{TO_K}.lora_A.weight": (8, 768), f"unet.{TO_K}.lora_B.weight": (640, 4)},
            ["different ranks", "down [8, 768], up [640, 4]"],
        ),
        (pair(f"unet.{TO_K}.lora_A.weight") | {f"unet.{TO_K}.lora_magnitude_vector": (640,)}, ["is a DoRA"]),
        (pair(f"unet.{TO_K}.lora_A.weight") | {f"unet.{TO_K}.lora_B.bias": (640,)}, ["not of a low-rank layer"]),
        ({"lora_unet_conv_in.hada_w1_a": (8, 8)}, ["not of a low-rank layer", "hada_w1_a"]),
        ({f"{TO_K}.lora_A.default.weight": (8, 768)}, ["an adapter's state", "export the run"]),
        ({"unet.conv_in.weight": (320, 4, 3, 3)}, ["not of a low-rank layer"]),
    ],
)
def test_what_does_not_fit_or_is_no_lora_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], told: list[str]
) -> None:
    file = header_file(tmp_path / "bad.safetensors", shapes)
    with pytest.raises(ModelError) as refused:
        check_fits(file, read_layers(file, "unet"), BASE)
    assert all(words in str(refused.value) for words in told), refused.value
    assert "bad.safetensors" in str(refused.value)


def test_what_a_header_cannot_tell_is_left_to_loading(tmp_path: Path) -> None:
    file = header_file(tmp_path / "a.safetensors", pair(ORIGINAL) | pair(RESNET, inputs=9, outputs=9))
    check_fits(file, read_layers(file, "unet"), BASE)
    flux = header_file(tmp_path / "b.safetensors", pair("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"))
    layers = read_layers(flux, "transformer")
    check_fits(flux, layers, {"transformer": {"x_embedder.weight": (64, 64)}})
    assert list(layers) == [("transformer", "double_blocks_0_img_attn_qkv")]


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_torn_file_is_refused(tmp_path: Path, length: int) -> None:
    file = header_file(tmp_path / "torn.safetensors", pair(f"unet.{TO_K}.lora_A.weight"))
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ModelError, match="not whole"):
        read_shapes(file)


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "renamed.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"not a safetensors file.*must be converted, not renamed"):
        read_shapes(tmp_path / "renamed.safetensors")
