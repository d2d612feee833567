"""Where each family of models keeps what pruning touches: facts, by the `model_type` of its config.

A pattern names tensors with two holes, `{layer}` and `{expert}`, and `*` for the rest of a name.
What is to be done follows from the pattern: one with an `{expert}` hole names the tensors of one
expert, which are kept, renumbered or dropped whole; in one without it, dimension 0 counts the
experts. Companions such as biases, MXFP4 `*_blocks` and `*_scales` or FP8 `*_scale_inv` need no
row of their own where the pattern ends in `*`.

A family is in the table when a tiny random model of it has been pruned, reloaded by stock
transformers with no key missing, unexpected or mismatched, and compared with the masked original.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from eaftflow.errors import EaftflowError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The facts of one family. Config keys are paths with dots; tensor patterns are as above."""

    experts_keys: tuple[str, ...]  # expert count; every one that is present changes
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)  # the first that is present counts
    layers_key: str = "num_hidden_layers"  # layers beyond it predict several tokens ahead
    groups_key: str | None = None  # router groups, where the family can limit routing to some
    groups_default: int = 1  # what transformers assumes where the config is silent
    router: tuple[str, ...]  # every MoE layer has each of these
    biases: tuple[str, ...] = ()  # for selection; sliced where present
    experts: tuple[str, ...]  # the layouts in use; the first that matches a name counts

    def locate(self, name: str) -> "Place | None":
        """Where the tensor `name` sits, or None where pruning leaves it alone."""
        for pattern in (*self.router, *self.biases, *self.experts):
            match = _regex(pattern).fullmatch(name)
            if match:
                expert = match.groupdict().get("expert")
                return Place(
                    pattern=pattern,
                    layer=int(match["layer"]),
                    expert=None if expert is None else int(expert),
                )
        return None

    def in_router(self, name: str) -> bool:
        """Whether the tensor `name` belongs to a router's module, listed above or not."""
        return bool(_regex(self.router[0].rpartition(".")[0] + ".*").fullmatch(name))


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a tensor's name says: by which pattern, of which layer, of which expert if of one."""

    pattern: str
    layer: int
    expert: int | None


def renumber(name: str, place: Place, new_expert: int) -> str:
    """The name of one expert's tensor after that expert has become `new_expert`."""
    match = _regex(place.pattern).fullmatch(name)
    assert match is not None, f"{name} is not at {place}"
    start, stop = match.span("expert")
    return f"{name[:start]}{new_expert}{name[stop:]}"


_MLP = "model.layers.{layer}.mlp"
_SPARSE = "model.layers.{layer}.block_sparse_moe"

_QWEN2_MOE = Architecture(
    experts_keys=("num_experts", "num_local_experts"),
    router=(f"{_MLP}.gate.weight",),
    experts=(f"{_MLP}.experts.{{expert}}.*", f"{_MLP}.experts.*"),
)
_DEEPSEEK_V3 = replace(
    _QWEN2_MOE,
    experts_keys=("n_routed_experts", "num_local_experts"),
    groups_key="n_group",
    groups_default=8,
    biases=(f"{_MLP}.gate.e_score_correction_bias",),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe": replace(_DEEPSEEK_V3, groups_default=1),
    "gpt_oss": Architecture(
        experts_keys=("num_local_experts", "num_experts"),
        router=(f"{_MLP}.router.weight", f"{_MLP}.router.bias"),
        experts=(f"{_MLP}.experts.*",),
    ),
    "granitemoe": Architecture(
        experts_keys=("num_local_experts",),
        router=(f"{_SPARSE}.router.layer.weight",),
        experts=(f"{_SPARSE}.input_linear.*", f"{_SPARSE}.output_linear.*"),
    ),
    "mixtral": Architecture(
        experts_keys=("num_local_experts", "num_experts"),
        router=(f"{_SPARSE}.gate.weight",),
        experts=(f"{_SPARSE}.experts.{{expert}}.*",),
    ),
    "olmoe": _QWEN2_MOE,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN2_MOE,
}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The facts for a model's config. Raises EaftflowError where its family is not in the table."""
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise EaftflowError(
            f"Models of type {model_type} cannot be pruned yet. "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]


def present(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Those of `keys`, paths with dots, that `config` has, with their values, in order."""
    found = {}
    for key in keys:
        *parents, last = key.split(".")
        holder: Any = config
        for parent in parents:
            holder = holder.get(parent) or {}
        if holder.get(last) is not None:
            found[key] = holder[last]
    return found


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    for hole, expression in (("layer", r"(?P<layer>\d+)"), ("expert", r"(?P<expert>\d+)")):
        escaped = escaped.replace(rf"\{{{hole}\}}", expression)
    return re.compile(escaped.replace(r"\*", ".+"))
