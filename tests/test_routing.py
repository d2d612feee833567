"""Routing against every expert called separately in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model
from torch import Tensor, nn

from eaftflow.errors import EaftflowError
from eaftflow.routing import (
    MoeLayer,
    Routing,
    RoutingRecorder,
    choose_engine,
    find_moe_layers,
    record_routing,
    row_norms,
)

FAMILIES = ["gpt_oss", "qwen3_moe"]
ENGINES = {"grouped_mm": "tap", "batched_mm": "tap", "eager": "delegate"}


def expert_output(experts: Any, expert: int, x_TD: Tensor) -> Tensor:
    """One expert of a stock module on `x_TD`, by its own formula, in float64."""
    up, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
    if experts.has_bias:  # gpt_oss: transposed, interleaved, clamped
        gate_up = x_TD.double() @ up + experts.gate_up_proj_bias[expert].double()
        gate, linear = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
        inner = (linear + 1) * gate * torch.sigmoid(gate * 1.702)
        return inner @ down + experts.down_proj_bias[expert].double()
    gate, linear = (x_TD.double() @ up.T).chunk(2, dim=-1)
    return (nn.functional.silu(gate) * linear) @ down.T


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_records_what_each_selected_expert_did(
    family: str, implementation: str, tmp_path: Path
) -> None:
    model = save_model(family, tmp_path)
    model.set_experts_implementation(implementation)
    layers = find_moe_layers(model)
    tappable = hasattr(layers[0].module, "has_post_expert_norm")  # transformers 5.17 has no such
    engine = ENGINES[implementation] if tappable else "delegate"
    assert [choose_engine(moe.module) for moe in layers] == [engine] * 2
    ids_BS = torch.arange(60).view(2, 30)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def remember(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[layer], outputs[layer] = args[0], output

        return hook

    for moe in layers:
        moe.module.register_forward_hook(remember(moe.layer))
    with torch.no_grad():
        stock = model(ids_BS).logits
        with record_routing(layers) as recorder:
            observed = model(ids_BS).logits
            routings = recorder.take()
        again = model(ids_BS).logits

    assert torch.equal(stock, again)  # the modules are as they were
    torch.testing.assert_close(observed, stock, rtol=0, atol=1e-6)
    for moe, routing in zip(layers, routings, strict=True):
        f_ETD = torch.stack(
            [expert_output(moe.module, e, inputs[moe.layer]) for e in range(moe.experts)]
        )
        f_TKD = f_ETD[routing.expert_TK.T, torch.arange(60)].transpose(0, 1)
        norm_TK = f_TKD.norm(dim=-1)
        torch.testing.assert_close(routing.norm_TK.double(), norm_TK, rtol=2e-6, atol=1e-7)
        # g is the weight really applied: the weighted sum is what the module returned
        weighted_TD = (f_TKD * routing.g_TK.double().unsqueeze(-1)).sum(1)
        torch.testing.assert_close(weighted_TD, outputs[moe.layer].double(), rtol=1e-5, atol=1e-6)
        # the check can fail: neighbouring tokens have other norms
        assert not torch.allclose(norm_TK.roll(1, 0), routing.norm_TK.double(), rtol=1e-2)


def test_find_moe_layers_names_layer_and_count(tmp_path: Path) -> None:
    layers = find_moe_layers(save_model("qwen3_moe", tmp_path, mlp_only_layers=[0]))
    assert [(moe.layer, moe.experts) for moe in layers] == [(1, 8)]


def test_dense_model_is_refused() -> None:
    with pytest.raises(EaftflowError, match="Sequential has no experts module"):
        find_moe_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_that_did_not_run_once_is_named() -> None:
    recorder = RoutingRecorder(
        [MoeLayer(layer=i, name=f"layers.{i}", experts=2, module=nn.Identity()) for i in (0, 1)]
    )
    routing = Routing(
        expert_TK=torch.zeros(1, 1).long(), g_TK=torch.ones(1, 1), norm_TK=torch.ones(1, 1)
    )
    recorder.emit("layers.0", routing)
    with pytest.raises(EaftflowError, match=r"1 of 2 MoE layers .* layers\.1 ran 0 times"):
        recorder.take()


def test_row_norms_are_float32_whatever_the_input() -> None:
    x_SD = torch.randn(1500, 7)
    half = x_SD.bfloat16()
    torch.testing.assert_close(row_norms(half), half.double().norm(dim=-1).float())
    torch.testing.assert_close(row_norms(x_SD), x_SD.double().norm(dim=-1).float())
