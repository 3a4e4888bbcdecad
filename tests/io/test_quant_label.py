"""A file is labelled as the hub labels it."""

import pytest

from diffquant.io.quant_label import quant_label


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("flux1-dev-Q4_K_S.gguf", "Q4_K_S"),
        ("flux1-dev-q4_k_m.gguf", "Q4_K_M"),
        ("flux1-dev-bf16-Q4_K_S.gguf", "Q4_K_S"),
        ("flux1-dev-Q4_K_S-F16te.gguf", "F16"),
        ("quants/Q8_0/model-Q5_1.gguf", "Q5_1"),
        ("Q8_0/model.gguf", ""),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m-IQ2_XXS.gguf", "IQ2_XXS"),
        ("m-55IQ2_XXS-34Q2_K-07Q8_0-03F16.gguf", "IQ2_XXS"),
        ("m-BF16.gguf", "BF16"),
        ("model.gguf", ""),
        ("qwen_image_fp8_e4m3fn.safetensors", "FP8_E4M3FN"),
        ("flux1-dev-fp8-e5m2.safetensors", "FP8_E5M2"),
        ("ltx_int8_convrot.safetensors", "INT8_CONVROT"),
        ("model.fp16.safetensors", "FP16"),
        ("flux1-dev.safetensors", ""),
        ("Q4_K_S.safetensors", ""),
    ],
)
def test_labels(name, label):
    assert quant_label(name) == label
