"""Attention with sinks, for models that stock transformers runs only in eager mode on CPU.

Eager attention writes several [B, H, T, T] float tensors a layer; at T = 2,048 that is most of a
capture's time on CPU. A sink is one more key whose score is the same for every query, so stock SDPA
computes the same attention when it is given a zero key and value with the sink as its mask entry.
Queries go in chunks, so causal and sliding-window layers read only the keys they can see.

Shapes: B blocks, H query heads, J key-value heads, T positions, Q queries of a chunk, W keys that a
chunk sees, F head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from eaftflow.errors import EaftflowError

NAME = "eaftflow_sinks"
_CHUNK = 256  # queries; small enough that a chunk's scores stay in cache


def choose_attention(model_class: Any, device: str) -> str | None:
    """The attention implementation to load `model_class` with; None leaves it to transformers.

    Where a model has no SDPA path, that is flex attention on CUDA and `attend_with_sinks` on CPU.
    """
    if getattr(model_class, "_supports_sdpa", True):
        return None
    if device != "cpu":
        return "flex_attention" if getattr(model_class, "_supports_flex_attn", False) else None
    if not getattr(model_class, "_supports_attention_backend", False):
        return None
    AttentionInterface.register(NAME, attend_with_sinks)
    return NAME


def attend_with_sinks(
    module: nn.Module,
    q_BHTF: Tensor,
    k_BJTF: Tensor,
    v_BJTF: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Causal attention over whole blocks, [B, T, H, F]; `s_aux` holds a sink logit a head.

    Raises EaftflowError for what it does not compute: masks, dropout, soft caps.
    """
    if attention_mask is not None or dropout or softcap is not None:
        raise EaftflowError(
            f"{type(module).__name__} asks for a mask, dropout or a soft cap, which eaftflow's "
            "attention does not compute."
        )
    H, T = q_BHTF.shape[1:3]
    window = sliding_window or T
    k_BHTF, v_BHTF = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BJTF, v_BJTF))
    chunks = []
    for start in range(0, T, _CHUNK):
        stop = min(start + _CHUNK, T)
        first = max(0, start - window + 1)
        mask_HQW = _visible(range(start, stop), range(first, stop), window, like=q_BHTF)
        k_BHWF, v_BHWF = k_BHTF[:, :, first:stop], v_BHTF[:, :, first:stop]
        if s_aux is not None:
            sink_HQ1 = s_aux.to(q_BHTF.dtype).view(1, H, 1, 1).expand(1, H, stop - start, 1)
            mask_HQW = torch.cat((sink_HQ1, mask_HQW.expand(1, H, -1, -1)), dim=-1)
            k_BHWF, v_BHWF = (functional.pad(x, (0, 0, 1, 0)) for x in (k_BHWF, v_BHWF))
        chunks.append(
            functional.scaled_dot_product_attention(
                q_BHTF[:, :, start:stop], k_BHWF, v_BHWF, attn_mask=mask_HQW, scale=scaling
            )
        )
    return torch.cat(chunks, dim=2).transpose(1, 2), None


def _visible(queries: range, keys: range, window: int, *, like: Tensor) -> Tensor:
    """The additive mask [1, Q, W]: 0 for the `window` keys up to the query, -inf for the others."""
    at_Q = torch.arange(queries.start, queries.stop, device=like.device)
    at_W = torch.arange(keys.start, keys.stop, device=like.device)
    ago_QW = at_Q[:, None] - at_W
    mask_QW = torch.zeros(ago_QW.shape, dtype=like.dtype, device=like.device)
    return mask_QW.masked_fill_((ago_QW < 0) | (ago_QW >= window), float("-inf"))[None, None]
