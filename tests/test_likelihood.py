"""p_t and H_t against full logits in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model
from torch import nn

from eaftflow import likelihood
from eaftflow.errors import EaftflowError
from eaftflow.likelihood import find_decoder, score_targets


@pytest.mark.parametrize(
    ("family", "config"),
    [("gpt_oss", {}), ("qwen3_moe", {}), ("granitemoe", {"logits_scaling": 6.0})],
)
def test_scores_equal_full_logits_in_float64(
    family: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(family, tmp_path, **config)
    monkeypatch.setattr(likelihood, "_CHUNK_BYTES", 4 * 320 * 7)  # 7 rows a chunk: 5 chunks
    ids_BS = torch.arange(40, 76).view(2, 18)
    target_T = torch.arange(100, 136)
    with torch.no_grad():
        logits_TV = model(ids_BS).logits.double().flatten(0, 1)
        output = find_decoder(model)(input_ids=ids_BS)
        hidden_TD = output.last_hidden_state.flatten(0, 1)
        scores = score_targets(model, output, hidden_TD, target_T, top_k=20)
        assert torch.equal(model(ids_BS).logits.double().flatten(0, 1), logits_TV)

    p_TV = torch.softmax(logits_TV, dim=-1)
    p_T = p_TV[torch.arange(36), target_T]
    top_TK = p_TV.topk(20).values
    q_TK = top_TK / top_TK.sum(-1, keepdim=True)
    H_T = -(q_TK * q_TK.log()).sum(-1) / math.log(20)
    torch.testing.assert_close(scores.p_T.double(), p_T, rtol=2e-6, atol=0)
    torch.testing.assert_close(scores.logp_T.double(), p_T.log(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(scores.H_T.double(), H_T, rtol=0, atol=2e-6)
    assert torch.equal(scores.top_T, logits_TV.argmax(-1))


def test_a_certain_prediction_has_p_1_and_entropy_0() -> None:
    logits_TV = torch.full((1, 50), -100.0)
    logits_TV[0, 3] = 100.0
    logp_T, H_T, top_T = likelihood._score_logits(logits_TV, torch.tensor([3]), top_k=20)
    assert (logp_T.exp().item(), H_T.item(), top_T.item()) == (1.0, 0.0, 3)


def test_a_uniform_prediction_has_entropy_1() -> None:
    _, H_T, _ = likelihood._score_logits(torch.zeros(1, 50), torch.tensor([3]), top_k=20)
    assert H_T.item() == pytest.approx(1.0)


def test_a_model_without_a_decoder_is_refused() -> None:
    with pytest.raises(EaftflowError, match="Linear has no decoder"):
        find_decoder(nn.Linear(2, 2))
