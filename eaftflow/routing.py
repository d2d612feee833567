"""Which experts each token was routed to, with what weight, and how large their outputs were.

Recorded inside one ordinary forward: only the routed experts run, through transformers' own experts
functions, and `g` is the third argument of the experts module, so whatever a family's router does
(renormalising, scaling, groups, biases) is done before. Two engines:

tap       The stock `grouped_mm` and `batched_mm` functions hand the unweighted expert outputs to
          `post_expert_norm` where a module has one; a probe there reads their norms and passes
          them on. Nothing is computed twice.
delegate  Calls the module's own forward with top-1 routing and unit weights, which returns the
          unweighted outputs, then weighs and sums them. For everything that is not local
          `grouped_mm` or `batched_mm`: hooked, quantised, or expert-parallel modules.

Shapes: T tokens, K top-k, S = T * K, D hidden.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eaftflow.errors import EaftflowError
from eaftflow.patching import override

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)(?:\.|$)")
_TAPPED = ("grouped_mm", "batched_mm")
_NORM_ROWS = 512  # rows converted to float32 at once on CPU; keeps the copy in cache


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """An experts module of a model: its decoder layer, its name, and how many experts it holds."""

    layer: int
    name: str
    experts: int
    module: nn.Module


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one layer's experts did for T tokens. All tensors stay on the layer's device."""

    expert_TK: Tensor  # int64
    g_TK: Tensor
    norm_TK: Tensor  # float32


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The experts modules of `model`, in order.

    Raises EaftflowError where there is none, or where two share a decoder layer.
    """
    found: list[MoeLayer] = []
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match and _is_experts(module):
            experts = _count_experts(module)
            layer = int(match.group(1))
            found.append(MoeLayer(layer=layer, name=name, experts=experts, module=module))
    if not found:
        raise EaftflowError(
            f"{type(model).__name__} has no experts module that eaftflow can observe: none takes "
            "(hidden_states, top_k_index, top_k_weights). Is it a Mixture-of-Experts model?"
        )
    layers = [moe.layer for moe in found]
    if len(set(layers)) < len(layers):
        raise EaftflowError(
            f"{type(model).__name__} has several experts modules in one decoder layer: "
            f"{', '.join(moe.name for moe in found)}. Such models are not supported."
        )
    return found


class RoutingRecorder:
    """Collects the routing of every MoE layer, forward by forward."""

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self.layers = layers
        self._emitted: dict[str, list[Routing]] = {moe.name: [] for moe in layers}

    def emit(self, name: str, routing: Routing) -> None:
        """Take what one layer did in the current forward."""
        self._emitted[name].append(routing)

    def take(self) -> list[Routing]:
        """The routing of the last forward, a layer each, and forget it.

        Raises EaftflowError unless every layer emitted exactly once.
        """
        wrong = {name: len(emitted) for name, emitted in self._emitted.items() if len(emitted) != 1}
        if wrong:
            name, times = next(iter(wrong.items()))
            raise EaftflowError(
                f"{len(wrong)} of {len(self.layers)} MoE layers did not run their experts exactly "
                f"once in a forward; {name} ran {times} times. A replaced kernel or a custom MoE "
                "block bypasses the experts module: load the model without hub kernels "
                "(use_kernels=False)."
            )
        return [self._emitted[moe.name].pop() for moe in self.layers]


@contextlib.contextmanager
def record_routing(layers: Sequence[MoeLayer]) -> Iterator[RoutingRecorder]:
    """Observe `layers` while the context lasts, and leave the modules as they were."""
    recorder = RoutingRecorder(layers)
    with contextlib.ExitStack() as stack:
        for moe in layers:
            observe = _tap if choose_engine(moe.module) == "tap" else _delegate
            stack.enter_context(observe(moe, recorder))
        yield recorder


def choose_engine(module: nn.Module) -> str:
    """`tap` for a local module that a stock grouped or batched function runs, else `delegate`."""
    parallel = getattr(module, "_is_hooked", False) or getattr(module, "_is_expert_parallel", False)
    tappable = hasattr(module, "has_post_expert_norm") and type(module).__name__ != "FP8Experts"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return "tap" if tappable and not parallel and implementation in _TAPPED else "delegate"


def row_norms(x_SD: Tensor) -> Tensor:
    """The float32 L2 norms of the rows of `x_SD`, shape [S]."""
    direct = x_SD.dtype == torch.float32 or x_SD.device.type != "cpu"
    chunks = (x_SD,) if direct else torch.split(x_SD, _NORM_ROWS)
    norms = [torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32) for rows in chunks]
    return torch.cat(norms)


@contextlib.contextmanager
def _tap(moe: MoeLayer, recorder: RoutingRecorder) -> Iterator[None]:
    module: Any = moe.module
    own_norm = module.post_expert_norm if module.has_post_expert_norm else None
    observed: list[Tensor] = []

    def probe(out_SD: Tensor) -> Tensor:
        if own_norm is not None:
            out_SD = own_norm(out_SD)
        observed.append(row_norms(out_SD))
        return out_SD

    def forward(hidden_TD: Tensor, expert_TK: Tensor, g_TK: Tensor) -> Tensor:
        out_TD: Tensor = stock(hidden_TD, expert_TK, g_TK)
        norm_S = observed.pop()
        if module.config._experts_implementation == "grouped_mm":  # rows sorted by expert
            order_S = torch.sort(expert_TK.reshape(-1)).indices
            norm_S = torch.empty_like(norm_S).index_copy_(0, order_S, norm_S)
        norm_TK = norm_S.view(expert_TK.shape)
        recorder.emit(moe.name, Routing(expert_TK=expert_TK, g_TK=g_TK, norm_TK=norm_TK))
        return out_TD

    stock = module.forward
    with (
        override(module, "forward", forward),
        override(module, name="has_post_expert_norm", value=True),
        override(module, "post_expert_norm", probe),
    ):
        yield


@contextlib.contextmanager
def _delegate(moe: MoeLayer, recorder: RoutingRecorder) -> Iterator[None]:
    module: Any = moe.module

    def forward(hidden_TD: Tensor, expert_TK: Tensor, g_TK: Tensor) -> Tensor:
        (T, K), D = expert_TK.shape, hidden_TD.shape[-1]
        out_SD: Tensor = stock(
            hidden_TD.reshape(T, D).repeat_interleave(K, dim=0),
            expert_TK.reshape(T * K, 1),
            torch.ones_like(g_TK).reshape(T * K, 1),
        ).view(T * K, D)
        norm_TK = row_norms(out_SD).view(T, K)
        recorder.emit(moe.name, Routing(expert_TK=expert_TK, g_TK=g_TK, norm_TK=norm_TK))
        weighted_TKD = out_SD.view(T, K, D) * g_TK.unsqueeze(-1)
        out_TD: Tensor = weighted_TKD.sum(dim=1).to(hidden_TD.dtype).view(hidden_TD.shape)
        return out_TD

    stock = module.forward
    with override(module, "forward", forward):
        yield


def _is_experts(module: nn.Module) -> bool:
    """Whether the module's own forward takes hidden states, top-k indices and top-k weights."""
    if "Experts" not in type(module).__name__:
        return False
    forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
    return len(parameters) == 4  # self and the three


def _count_experts(module: Any) -> int:
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int):
        raise EaftflowError(
            f"{type(module).__name__} does not say how many experts it holds (num_experts)."
        )
    return experts
