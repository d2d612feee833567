"""The whole way, against plain torch: capture and SQL give what calling every expert gives."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_routing import expert_output
from tiny import TEXT, save_model
from torch import Tensor
from transformers import AutoTokenizer

from eaftflow.capture import CaptureOptions, capture
from eaftflow.packing import Row, pack_rows
from eaftflow.relations import Parameters
from eaftflow.rescore import rescore

WEIGHTS = {"w_good": 1.0, "w_uncertain": 0.25, "w_conflict": -3.0}


def route(family: str, router: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The selected experts [T, 2] and their weights, by each family's own rule, in float64."""
    logits_TE = x_TD.double() @ router.weight.double().T
    if family == "gpt_oss":
        value_TK, expert_TK = (logits_TE + router.bias.double()).topk(2)
        return expert_TK, value_TK.softmax(-1)
    g_TK, expert_TK = logits_TE.softmax(-1).topk(2)
    return expert_TK, g_TK / g_TK.sum(-1, keepdim=True)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_saliency_equals_ten_plain_lines_of_torch(family: str, tmp_path: Path) -> None:
    model = save_model(family, tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{text * 5}"}}\n' for text in TEXT))
    options = CaptureOptions(model=str(tmp_path / "model"), data=(str(data),), seq_len=48)
    run = capture(options, out=tmp_path / "run").run
    ranking = rescore(run.path, parameters=Parameters(**WEIGHTS)).ranking.table.to_pylist()

    rows = [Row(pack="rows", source="", row=i, text=text * 5) for i, text in enumerate(TEXT)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    blocks = pack_rows(rows, tokenizer, seq_len=48)
    token_NS = torch.from_numpy(blocks.token_NS).long()
    scored_NT = torch.from_numpy(blocks.scored_NS)[:, 1:]
    inputs: dict[int, Tensor] = {}
    for layer, decoder_layer in enumerate(model.model.layers):
        decoder_layer.mlp.register_forward_pre_hook(
            lambda _m, args, layer=layer: inputs.update({layer: args[0]})
        )
    with torch.no_grad():
        p_TV = model(token_NS).logits.double().softmax(-1)[:, :-1][scored_NT]
    p_T = p_TV.gather(1, token_NS[:, 1:][scored_NT][:, None]).squeeze(1)
    top_TK = p_TV.topk(20).values / p_TV.topk(20).values.sum(-1, keepdim=True)
    H_T = -(top_TK * top_TK.log()).sum(-1) / math.log(20)
    rank = math.ceil(0.15 * len(p_T)) - 1
    low_T = p_T <= p_T.sort().values[rank]
    w_T = torch.full_like(p_T, WEIGHTS["w_good"])
    w_T[low_T & (H_T.sort().values[math.ceil(0.85 * len(H_T)) - 1] <= H_T)] = 0.25
    w_T[low_T & (H_T.sort().values[rank] >= H_T)] = WEIGHTS["w_conflict"]
    for layer, decoder_layer in enumerate(model.model.layers):
        x_TD, mlp = inputs[layer][:, :-1][scored_NT], decoder_layer.mlp
        router = mlp.router if family == "gpt_oss" else mlp.gate
        expert_TK, g_TK = route(family, router, x_TD)
        for row in (row for row in ranking if row["layer"] == layer):
            t, k = (expert_TK == row["expert"]).nonzero(as_tuple=True)
            norm = expert_output(mlp.experts, row["expert"], x_TD[t]).norm(dim=-1)
            expected = (w_T[t] * g_TK[t, k] * norm).mean().item()
            assert row["n"] == len(t)
            if len(t):
                assert row["saliency"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            else:
                assert row["saliency"] is None
    assert {row["n_conflict"] > 0 for row in ranking} == {True, False}
    assert (w_T == 0.25).any()
