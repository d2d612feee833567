"""How right the model was about each token: `p_t`, `H_t`, and what it preferred.

The decoder runs once; the head then runs over chunks of tokens, so logits of a whole batch never
exist. A chunk goes through the model's own forward with the decoder stubbed to return the chunk's
hidden states: soft caps, scaling and whatever else a family does to its logits apply themselves.

Shapes: T tokens, D hidden, V vocabulary, K entropy top-K.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eaftflow.errors import EaftflowError
from eaftflow.patching import override

_CHUNK_BYTES = 128 << 20  # float32 logits of one chunk


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The score of T predictions. Float32, on the model's device."""

    p_T: Tensor
    logp_T: Tensor  # natural log
    H_T: Tensor  # in [0, 1]
    top_T: Tensor  # int64


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that turns token ids into the hidden states that `model`'s head reads."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (getattr(model, prefix, None) if prefix else None, _get_decoder(model)):
        if isinstance(candidate, nn.Module) and candidate is not model:
            return candidate
    raise EaftflowError(
        f"{type(model).__name__} has no decoder that eaftflow can run apart from its head "
        "(neither its base model nor get_decoder())."
    )


def score_targets(
    model: nn.Module, decoder_output: Any, hidden_TD: Tensor, target_T: Tensor, *, top_k: int
) -> Likelihood:
    """The likelihood of `target_T` under the predictions made from `hidden_TD`.

    H_t is the entropy of the `top_k` most probable tokens, renormalised to sum 1, divided by
    ln(top_k). `decoder_output` is any output of the model's decoder; it lends its type.
    """
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    with _stubbed_decoder(model, decoder_output) as compute_logits:
        rows = max(1, _CHUNK_BYTES // (4 * _vocabulary(model)))
        for chunk_TD, chunk_T in zip(
            torch.split(hidden_TD, rows), torch.split(target_T, rows), strict=True
        ):
            columns.append(_score_logits(compute_logits(chunk_TD).float(), chunk_T, top_k=top_k))
    logp_T, H_T, top_T = (torch.cat(column) for column in zip(*columns, strict=True))
    return Likelihood(p_T=logp_T.exp(), logp_T=logp_T, H_T=H_T, top_T=top_T)


def _score_logits(
    logits_TV: Tensor, target_T: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    lse_T = torch.logsumexp(logits_TV, dim=-1)
    logp_T = logits_TV.gather(1, target_T[:, None]).squeeze(1) - lse_T
    K = min(top_k, logits_TV.shape[-1])
    top_TK, index_TK = torch.topk(logits_TV, K, dim=-1)
    entropy_T = torch.special.entr(torch.softmax(top_TK, dim=-1)).sum(dim=-1)
    return logp_T.clamp(max=0.0), (entropy_T / math.log(K)).clamp(0.0, 1.0), index_TK[:, 0]


@contextlib.contextmanager
def _stubbed_decoder(model: nn.Module, decoder_output: Any) -> Iterator[Any]:
    """A function from hidden states [T, D] to logits [T, V], by the model's own forward."""
    decoder = find_decoder(model)
    head = _head(model)
    hidden: list[Tensor] = []

    def return_hidden(*_args: object, **_kwargs: object) -> Any:
        output = copy.copy(decoder_output)
        output["last_hidden_state"] = hidden[-1]
        return output

    def compute_logits(chunk_TD: Tensor) -> Tensor:
        hidden[:] = [chunk_TD.unsqueeze(0)]
        ids = torch.zeros(1, 1, dtype=torch.long, device=chunk_TD.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.squeeze(0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(override(decoder, "forward", return_hidden))
        if isinstance(head, nn.Linear) and _wants_float32(head.weight):
            stack.enter_context(override(head, "forward", partial(_linear_float32, head)))
        yield compute_logits


def _wants_float32(weight: Tensor) -> bool:
    """A half-precision head on CUDA: its logits would be rounded in steps of up to 0.125."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def _linear_float32(head: nn.Linear, x_BTD: Tensor) -> Tensor:
    """The head's product with float32 accumulation kept."""
    B, T, D = x_BTD.shape
    out = torch.mm(x_BTD.reshape(B * T, D), head.weight.t(), out_dtype=torch.float32)
    if head.bias is not None:
        out = out + head.bias
    return out.view(B, T, -1)


def _get_decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else None


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _vocabulary(model: Any) -> int:
    head = _head(model)
    return int(head.weight.shape[0]) if head is not None else int(model.config.vocab_size)
