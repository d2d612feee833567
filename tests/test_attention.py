"""Attention with sinks against the stock model's eager attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

from eaftflow import attention
from eaftflow.attention import attend_with_sinks, choose_attention
from eaftflow.errors import EaftflowError


@pytest.mark.parametrize("chunk", [7, 32, 256])
def test_logits_equal_stock_eager(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full and sliding layers (window 16), blocks longer than window and chunk, unlike heads."""
    monkeypatch.setattr(attention, "_CHUNK", chunk)
    model = save_model("gpt_oss", tmp_path, num_attention_heads=4, num_key_value_heads=2)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    ids_BT = torch.randint(0, 320, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(ids_BT, use_cache=False).logits
        name = choose_attention(type(model), "cpu")
        assert name == attention.NAME
        model.set_attn_implementation(name)
        ours = model(ids_BT, use_cache=False).logits
        model.model.layers[0].self_attn.sinks.fill_(9.0)  # the sinks matter
        other = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=2e-6)
    assert (other - stock).abs().max() > 1e-3


def test_models_with_sdpa_are_left_alone(tmp_path: Path) -> None:
    assert choose_attention(type(save_model("qwen3_moe", tmp_path)), "cpu") is None


def test_models_without_sdpa_get_flex_attention_on_cuda() -> None:
    class Eager:
        _supports_sdpa = False
        _supports_flex_attn = True

    assert choose_attention(Eager, "cuda") == "flex_attention"
    assert choose_attention(Eager, "cpu") is None  # no attention backend to plug into


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"dropout": 0.1}])
def test_what_it_does_not_compute_is_refused(option: dict[str, Any]) -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(EaftflowError, match="asks for a mask, dropout or a soft cap"):
        attend_with_sinks(torch.nn.Identity(), q, q, q, None, scaling=1.0, **option)
