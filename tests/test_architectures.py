"""The table of families: what its patterns match, and what they must not."""

import pytest

from eaftflow.architectures import (
    ARCHITECTURES,
    Place,
    find_architecture,
    present,
    renumber,
)
from eaftflow.errors import EaftflowError


@pytest.mark.parametrize(
    ("model_type", "name", "layer", "expert"),
    [
        ("gpt_oss", "model.layers.3.mlp.router.weight", 3, None),
        ("gpt_oss", "model.layers.3.mlp.router.bias", 3, None),
        ("gpt_oss", "model.layers.3.mlp.experts.gate_up_proj_bias", 3, None),
        ("gpt_oss", "model.layers.11.mlp.experts.down_proj_blocks", 11, None),
        ("gpt_oss", "model.layers.11.mlp.experts.down_proj_scales", 11, None),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", 0, None),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight", 0, 7),
        ("qwen3_moe", "model.layers.5.mlp.experts.12.up_proj.weight_scale_inv", 5, 12),
        ("qwen3_moe", "model.layers.5.mlp.experts.gate_up_proj", 5, None),
        ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", 3, None),
        ("granitemoe", "model.layers.1.block_sparse_moe.router.layer.weight", 1, None),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight", 1, None),
    ],
)
def test_names_that_pruning_touches(
    model_type: str, name: str, layer: int, expert: int | None
) -> None:
    place = ARCHITECTURES[model_type].locate(name)
    assert place is not None
    assert (place.layer, place.expert) == (layer, expert)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt_oss", "model.layers.3.self_attn.sinks"),
        ("gpt_oss", "other.model.layers.3.mlp.router.weight"),
        ("qwen2_moe", "model.layers.3.mlp.shared_expert.up_proj.weight"),
        ("qwen2_moe", "model.layers.3.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.3.mlp.shared_experts.up_proj.weight"),
        ("deepseek_v3", "model.layers.0.mlp.gate_proj.weight"),
        ("mixtral", "lm_head.weight"),
    ],
)
def test_names_that_pruning_leaves_alone(model_type: str, name: str) -> None:
    architecture = ARCHITECTURES[model_type]
    assert architecture.locate(name) is None
    assert not architecture.in_router(name)


def test_a_router_tensor_that_no_pattern_names_is_noticed() -> None:
    architecture = ARCHITECTURES["gpt_oss"]
    for tail in ("scale", "weight.extra"):
        name = f"model.layers.3.mlp.router.{tail}"
        assert architecture.locate(name) is None
        assert architecture.in_router(name)


def test_renumber_changes_the_expert_and_nothing_else() -> None:
    name = "model.layers.7.mlp.experts.7.gate_proj.weight"
    place = ARCHITECTURES["qwen3_moe"].locate(name)
    assert isinstance(place, Place)
    assert renumber(name, place, 10) == "model.layers.7.mlp.experts.10.gate_proj.weight"


def test_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(EaftflowError, match=r"type jetmoe cannot be pruned.*gpt_oss, granitemoe"):
        find_architecture({"model_type": "jetmoe"})
    with pytest.raises(EaftflowError, match="None"):
        find_architecture({})


def test_present_follows_dots_and_skips_null() -> None:
    config = {"a": 1, "b": None, "text_config": {"c": 2}}
    assert present(config, ("a", "b", "text_config.c", "text_config.d", "nowhere.e")) == {
        "a": 1,
        "text_config.c": 2,
    }
