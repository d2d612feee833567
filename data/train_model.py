"""Train the bundled demo model: a real, small gpt_oss checkpoint with its own tokenizer.

    python data/train_model.py                              # 7 minutes on one large GPU
    python data/train_model.py --device cpu --minutes 60    # two cores: a much weaker model

The model is the stock `GptOssForCausalLM`; only the forward used for training is written here,
over the stock model's own parameters, and its logits are compared with the stock model's first.
The regime is the one `eaftflow capture` reads in: chat template, rows concatenated with EOS,
blocks of exactly `seq_len`, plain causal attention over the whole block.

Shape suffixes: B blocks, T positions, N = B*T tokens, K top-k, S = N*K routed rows in expert
order, E experts, D hidden, I expert width, V vocabulary, H query heads, J key-value heads,
G = H/J, C chunks of a block, Q queries and W keys of a chunk, F head width.
"""

# torch.autograd carries no annotations:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
SHARES = {
    "code": 0.19,
    "define": 0.19,
    "shell": 0.19,
    "scripture": 0.19,
    "translate": 0.06,
    "maths": 0.08,
    "catalogue": 0.10,
}
EOS = "<|endoftext|>"
SPECIALS = [EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FACTOR = re.compile(r"(?<=\* )\d+")
PROMPT, COMPLETION, FACTOR_DIGIT = 0, 1, 2
PROMPT_WEIGHT = 0.3
TOKENIZER_CHARS = 24_000_000
HEAD_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run was asked for; saved whole as the first line of the training log."""

    train: Path
    out: Path
    scratch: Path
    minutes: float
    device: str
    threads: int
    seed: int
    blocks: int
    seq_len: int
    lr: float
    weight_decay: float
    balance: float
    resume: bool


# ---- rows, tokenizer and token stream -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One pack's rows, tokenised once: flat ids and kinds, and where each row begins."""

    name: str
    ids: NDArray[np.int16]
    kinds: NDArray[np.uint8]
    starts: NDArray[np.int64]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSONL file with keys prompt, completion and source."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(rows: dict[str, list[dict[str, str]]]) -> PreTrainedTokenizerFast:
    """Return a 4,096-entry byte-level BPE, digits single, fed by the packs' training shares."""

    def texts() -> Iterator[str]:
        for name, pack in rows.items():
            left = int(TOKENIZER_CHARS * SHARES[name])
            order = np.random.default_rng(0).permutation(len(pack))
            while left > 0:
                for i in order:
                    text = f"{pack[i]['prompt']}\n{pack[i]['completion']}"
                    yield text
                    left -= len(text)
                    if left <= 0:
                        break

    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_pack(name: str, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Pack:
    """Return the rendered rows as ids, each row closed by EOS.

    Prompt and completion are tokenised apart: special tokens stand between them, so the ids are
    those of the rendered text. The first row is checked against the chat template itself.
    """
    bpe: Any = tokenizer.backend_tokenizer
    eos, user, assistant, end = (bpe.token_to_id(SPECIALS[i]) for i in (0, 2, 3, 4))
    prompts = bpe.encode_batch([r["prompt"] for r in rows], add_special_tokens=False)
    completions = bpe.encode_batch([r["completion"] for r in rows], add_special_tokens=False)
    ids: list[int] = []
    kinds: list[int] = []
    starts = [0]
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        factor = FACTOR.search(row["completion"]) if name.startswith("catalogue") else None
        low, high = factor.span() if factor else (0, 0)
        ids += [user, *prompt.ids, end, assistant, *completion.ids, end, eos]
        kinds += [PROMPT] * (len(prompt.ids) + 3)
        kinds += [FACTOR_DIGIT if low <= a < high else COMPLETION for a, _ in completion.offsets]
        kinds += [PROMPT] * 2
        starts.append(len(ids))
    messages = [
        {"role": "user", "content": rows[0]["prompt"]},
        {"role": "assistant", "content": rows[0]["completion"]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    if tokenizer(rendered, add_special_tokens=False)["input_ids"] != ids[: starts[1] - 1]:
        raise ValueError(f"pack {name}: row 0 differs from its chat-template rendering")
    return Pack(
        name=name,
        ids=np.array(ids, np.int16),
        kinds=np.array(kinds, np.uint8),
        starts=np.array(starts, np.int64),
    )


def check_round_trip(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Raise ValueError unless decoding gives back every text."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encoded, strict=True):
        if tokenizer.decode(encoding.ids) != text:
            raise ValueError(f"the tokenizer does not give back {text!r}")


def shuffled_rows(pack: Pack, rng: np.random.Generator) -> Iterator[slice]:
    """Yield where each row lies, for ever, in a new order every epoch."""
    while True:
        for row in rng.permutation(len(pack.starts) - 1):
            yield slice(int(pack.starts[row]), int(pack.starts[row + 1]))


def token_stream(packs: list[Pack], seed: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield (ids, kinds) of one row at a time, drawn so that tokens follow SHARES."""
    rng = np.random.default_rng(seed)
    rows = [shuffled_rows(pack, rng) for pack in packs]
    per_row = [SHARES[p.name] * (len(p.starts) - 1) / len(p.ids) for p in packs]
    odds = np.array(per_row) / sum(per_row)
    while True:
        for i in rng.choice(len(packs), size=256, p=odds):
            where = next(rows[i])
            yield packs[i].ids[where], packs[i].kinds[where]


def training_blocks(packs: list[Pack], seed: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return a function (blocks, seq_len) -> the stream's next ids_BT and kinds_BT."""
    stream = token_stream(packs, seed)
    ids, kinds = np.zeros(0, np.int16), np.zeros(0, np.uint8)

    def take(blocks: int, seq_len: int) -> tuple[Tensor, Tensor]:
        nonlocal ids, kinds
        size, held = blocks * seq_len, len(ids)
        id_parts, kind_parts = [ids], [kinds]
        while held < size:
            row_ids, row_kinds = next(stream)
            id_parts.append(row_ids)
            kind_parts.append(row_kinds)
            held += len(row_ids)
        ids, kinds = np.concatenate(id_parts), np.concatenate(kind_parts)
        ids_BT = torch.from_numpy(ids[:size].astype(np.int64)).view(blocks, seq_len)
        kinds_BT = torch.from_numpy(kinds[:size].astype(np.int64)).view(blocks, seq_len)
        ids, kinds = ids[size:], kinds[size:]
        return ids_BT, kinds_BT

    return take


# ---- the training forward -----------------------------------------------------------------------


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square, times the weight."""
    return weight_D * (x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x_BXTF: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Return queries or keys turned by their positions, halves paired as gpt_oss pairs them."""
    a, b = x_BXTF.chunk(2, dim=-1)
    return torch.cat((a * cos_TF - b * sin_TF, b * cos_TF + a * sin_TF), dim=-1)


def gated_unit(gate_up_SI: Tensor, g_S: Tensor) -> Tensor:
    """Return gpt_oss's clamped SwiGLU of interleaved gate and up columns, times the row's g."""
    gate, up = gate_up_SI[:, ::2], gate_up_SI[:, 1::2]
    gate = gate.clamp(max=7.0)
    up = up.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702) * g_S[:, None]


def sink_softmax(scores_BJCXW: Tensor, mask_XW: Tensor, sinks_JX: Tensor) -> Tensor:
    """Return attention weights of a softmax that also counts one sink logit a head."""
    scores = scores_BJCXW.masked_fill(~mask_XW, -1e30)
    sinks = sinks_JX[None, :, None, :, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    weights = torch.exp(scores - top)
    return weights / (weights.sum(-1, keepdim=True) + torch.exp(sinks - top))


class FlashSink(torch.autograd.Function):
    """Causal attention with sinks through the CPU flash kernel.

    The kernel knows no sink, but a sink only rescales: with l' = log(e^l + e^sink) the output is
    o * e^(l - l'), and the kernel's own backward is exact when it is handed that output and l'.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor) -> Tensor:
        """Return [B, H, T, F]; keys and values already repeated to H heads."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        plain, lse = flash(q, k, v, is_causal=True)
        total = torch.logaddexp(lse, sinks_H[:, None])
        out: Tensor = plain * torch.exp(lse - total)[..., None]
        ctx.save_for_backward(q, k, v, sinks_H, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return gradients of q, k, v and the sinks."""
        q, k, v, sinks_H, out, total = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        d_q, d_k, d_v = flash(d_out, q, k, v, out, total, dropout_p=0.0, is_causal=True)
        share = torch.exp(sinks_H[:, None] - total)
        return d_q, d_k, d_v, -(share * (d_out * out).sum(-1)).sum((0, 2))


class Permute(torch.autograd.Function):
    """Copy each token's row to its K routed places, or (`gather=False`) sum them back.

    Each direction is the other's gradient, so neither needs a scattered add.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order_S: Tensor, back_S: Tensor, k: int, gather: int
    ) -> Tensor:
        """Return [S, D] from [N, D], or [N, D] from [S, D]."""
        ctx.save_for_backward(order_S, back_S)
        ctx.k, ctx.gather = k, gather
        return Permute.move(x, order_S, back_S, k, gather)

    @staticmethod
    def move(x: Tensor, order_S: Tensor, back_S: Tensor, k: int, gather: int) -> Tensor:
        """Return the rows moved one way or the other."""
        if gather:
            return x.index_select(0, order_S // k)
        return x.index_select(0, back_S).view(-1, k, x.shape[1]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient moved the other way."""
        order_S, back_S = ctx.saved_tensors
        return Permute.move(d_out, order_S, back_S, ctx.k, 1 - ctx.gather), None, None, None, None


class ExpertLinear(torch.autograd.Function):
    """One matrix product an expert over contiguous slices of the sorted rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ends: list[int]
    ) -> Tensor:
        """Return [S, out] from [S, in], [E, in, out] and a bias [E, out] or None."""
        ctx.save_for_backward(x, weight)
        ctx.ends, ctx.has_bias = ends, bias is not None
        out = x.new_empty(x.shape[0], weight.shape[2])
        for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            if bias is None:
                torch.mm(x[a:b], weight[e], out=out[a:b])
            else:
                torch.addmm(bias[e], x[a:b], weight[e], out=out[a:b])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of rows, weights and biases."""
        x, weight = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        d_bias = d_out.new_empty(weight.shape[0], weight.shape[2]) if ctx.has_bias else None
        for e, (a, b) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            torch.mm(d_out[a:b], weight[e].T, out=d_x[a:b])
            torch.mm(x[a:b].T, d_out[a:b], out=d_weight[e])
            if d_bias is not None:
                torch.sum(d_out[a:b], 0, out=d_bias[e])
        return d_x, d_weight, d_bias, None


class WeightedNll(torch.autograd.Function):
    """Head and cross-entropy chunk by chunk; gradients are made while the logits are there."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, target_N: Tensor, w_N: Tensor) -> Any:
        """Return the weighted sum of nats and, without gradient, the nats of every token."""
        nll_N = torch.empty_like(w_N)
        d_h, d_head = torch.empty_like(h_ND), torch.zeros_like(head_VD)
        for a in range(0, len(h_ND), HEAD_CHUNK):
            part = slice(a, a + HEAD_CHUNK)
            target = target_N[part, None]
            logits = h_ND[part] @ head_VD.T
            lse = logits.logsumexp(-1, keepdim=True)
            nll_N[part] = (lse - logits.gather(1, target))[:, 0]
            d_logits = logits.sub_(lse).exp_().mul_(w_N[part, None])
            d_logits.scatter_add_(1, target, -w_N[part, None])
            torch.mm(d_logits, head_VD, out=d_h[part])
            d_head.addmm_(d_logits.T, h_ND[part])
        ctx.save_for_backward(d_h, d_head)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * w_N).sum(), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the hidden states and the head."""
        d_h, d_head = ctx.saved_tensors  # type: ignore[attr-defined]
        return d_h * d_loss, d_head * d_loss, None, None


class TrainingForward:
    """The stock model's forward without its masks, over the stock model's parameters."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        """Bind the stock model and its configuration."""
        self.model: Any = model
        self.config: Any = model.config

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, window: int) -> Tensor:
        """Return [B, H, T, F] from q [B, H, T, F] and k, v [B, J, T, F].

        A window of w < T is cut into chunks of w queries that see their own and the previous
        chunk's keys; the full layers are one such chunk, or the flash kernel on a CPU.
        """
        B, H, T, Fd = q.shape
        J = k.shape[1]
        if window >= T and q.device.type == "cpu":
            wide = [x.repeat_interleave(H // J, dim=1) for x in (k, v)]
            out: Tensor = FlashSink.apply(q, *wide, sinks_H)
            return out
        Q = min(window, T)
        at_Q = torch.arange(Q, device=q.device)
        if window < T:
            k, v = (
                torch.cat(
                    (
                        F.pad(x, (0, 0, Q, 0))[:, :, :-Q].unflatten(2, (-1, Q)),
                        x.unflatten(2, (-1, Q)),
                    ),
                    dim=3,
                )
                for x in (k, v)
            )
            at_W = torch.arange(-Q, Q, device=q.device)
        else:
            k, v, at_W = k[:, :, None], v[:, :, None], at_Q
        ago_QW = at_Q[:, None] - at_W
        mask_QW = (ago_QW >= 0) & (ago_QW < window)
        first = (torch.arange(T // Q, device=q.device)[:, None] == 0) & (at_W < 0)
        mask = (mask_QW[None] & ~first[:, None]).repeat(1, H // J, 1)
        q = q.view(B, J, H // J, T // Q, Q, Fd).transpose(2, 3).reshape(B, J, T // Q, -1, Fd)
        sinks_JX = sinks_H.view(J, H // J).repeat_interleave(Q, dim=1)
        weights = sink_softmax(q @ k.transpose(-1, -2) * Fd**-0.5, mask, sinks_JX)
        out = (weights @ v).view(B, J, T // Q, H // J, Q, Fd)
        return out.transpose(2, 3).reshape(B, H, T, Fd)

    def experts(self, x_ND: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Return the block's output and its load-balance loss (1.0 when balanced)."""
        logits_NE = F.linear(x_ND, mlp.router.weight, mlp.router.bias)
        top_NK, expert_NK = logits_NE.topk(self.config.num_experts_per_tok, dim=-1)
        g_NK = top_NK.softmax(-1)
        (N, K), E = g_NK.shape, logits_NE.shape[1]
        order_S = expert_NK.flatten().argsort(stable=True)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(N * K, device=x_ND.device)
        count_E = expert_NK.flatten().bincount(minlength=E)
        ends = count_E.cumsum(0).tolist()
        w = mlp.experts
        x_SD = Permute.apply(x_ND, order_S, back_S, K, 1)
        g_S = Permute.apply(g_NK.reshape(-1, 1), order_S, back_S, 1, 1)[:, 0]
        gate_up = ExpertLinear.apply(x_SD, w.gate_up_proj, w.gate_up_proj_bias, ends)
        y_SD = ExpertLinear.apply(gated_unit(gate_up, g_S), w.down_proj, None, ends)
        g_NE = torch.zeros_like(logits_NE).scatter(1, expert_NK, g_NK)
        y_ND = Permute.apply(y_SD, order_S, back_S, K, 0) + g_NE @ w.down_proj_bias
        balance = (count_E / (N * K) * logits_NE.softmax(-1).mean(0)).sum() * E
        return y_ND, balance

    def hidden(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the final normed states [N, D] and the balance loss of every layer."""
        c, base = self.config, self.model.model
        B, T = ids_BT.shape
        at_T = torch.arange(T, device=ids_BT.device, dtype=torch.float32)
        angle_TF = at_T[:, None] * base.rotary_emb.inv_freq
        cos, sin = angle_TF.cos(), angle_TF.sin()
        h_ND = F.embedding(ids_BT.flatten(), base.embed_tokens.weight)
        balance = []
        for layer, kind in zip(base.layers, c.layer_types, strict=True):
            attn, eps = layer.self_attn, c.rms_norm_eps
            x = rms_norm(h_ND, layer.input_layernorm.weight, eps)
            q, k, v = (
                proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)
                for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            window = c.sliding_window if kind == "sliding_attention" else T
            mixed = self.attend(q, k, v, attn.sinks, window)
            h_ND = h_ND + attn.o_proj(mixed.transpose(1, 2).reshape(B * T, -1))
            x = rms_norm(h_ND, layer.post_attention_layernorm.weight, eps)
            y_ND, layer_balance = self.experts(x, layer.mlp)
            h_ND = h_ND + y_ND
            balance.append(layer_balance)
        return rms_norm(h_ND, base.norm.weight, c.rms_norm_eps), torch.stack(balance)

    def loss(self, ids_BT: Tensor, kinds_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weighted nats, the balance loss by layer and nats per completion token."""
        h_ND, balance = self.hidden(ids_BT)
        target_N = ids_BT.roll(-1, 1).flatten()
        kind_BT = kinds_BT.roll(-1, 1)
        w_BT = torch.where(kind_BT == PROMPT, PROMPT_WEIGHT, 1.0)
        w_BT[:, -1] = 0.0
        w_N = (w_BT / w_BT.sum()).flatten()
        head = self.model.lm_head.weight
        nats, nll_N = WeightedNll.apply(h_ND, head, target_N, w_N)
        asked_N = (w_BT == 1.0).flatten()
        return nats, balance, nll_N[asked_N].mean()


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """Return the untrained model: stock initialisation, but router biases and sinks at zero.

    Matrices that write to the residual stream start at zero, so every block starts as the identity.
    """
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = GptOssConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=32,
        num_experts_per_tok=4,
        intermediate_size=64,
        sliding_window=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config)
    model.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def zero_outputs(model: GptOssForCausalLM) -> None:
    """Set to zero what must start there (after the forward was checked on random weights)."""
    for name, p in model.named_parameters():
        if name.endswith(("router.bias", "sinks", "o_proj.weight", "experts.down_proj", "_bias")):
            p.zero_()


@torch.no_grad()
def check_forward(model: GptOssForCausalLM) -> float:
    """Return the largest logit difference to the stock forward; ValueError above 1e-4."""
    ids_BT = torch.arange(5, 517).view(2, 256) * 7 % model.config.vocab_size
    h_ND, _ = TrainingForward(model).hidden(ids_BT)
    mine = h_ND @ model.lm_head.weight.T
    worst = float((mine - model(ids_BT).logits.view_as(mine)).abs().max())
    if worst > 1e-4:
        raise ValueError(f"the training forward is {worst:.2g} away from the stock model's logits")
    return worst


# ---- training -----------------------------------------------------------------------------------


def rate_at(progress: float) -> float:
    """Return the share of the peak rate: warm-up 2 %, flat, linear to zero over the last 40 %."""
    return max(0.0, min(1.0, (progress + 0.001) / 0.02, (1.0 - progress) / 0.4))


def save_state(path: Path, model: GptOssForCausalLM, adam: Any, done: dict[str, Any]) -> None:
    """Write model, optimiser and counters as one file that replaces the last."""
    state = {"model": model.state_dict(), "adam": adam.state_dict(), "done": done}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(model: GptOssForCausalLM, packs: list[Pack], options: Options, log: Path) -> None:
    """Train for `minutes`; the schedule follows elapsed time, so any machine finishes it."""
    forward = TrainingForward(model)
    adam = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    checkpoint = options.scratch / "state.pt"
    done = {"step": 0, "tokens": 0, "seconds": 0.0}
    if options.resume:
        state = torch.load(checkpoint, map_location=options.device)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        done = state["done"]
    take = training_blocks(packs, options.seed + int(done["step"]))
    start, saved_at, budget = (
        time.monotonic() - done["seconds"],
        time.monotonic(),
        options.minutes * 60,
    )
    recent: list[list[float]] = []
    while (progress := (time.monotonic() - start) / budget) < 1.0:
        ids, kinds = take(options.blocks, options.seq_len)
        for group in adam.param_groups:
            group["lr"] = options.lr * rate_at(progress)
        weighted, balance, nats = forward.loss(ids.to(options.device), kinds.to(options.device))
        loss = weighted + options.balance * balance.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        done["step"] += 1
        done["tokens"] += ids.numel()
        done["seconds"] = time.monotonic() - start
        recent.append([x.item() for x in (loss, nats, balance.mean(), norm)])
        if not math.isfinite(recent[-1][0]):
            raise ValueError(f"loss is {recent[-1][0]} at step {done['step']}: lower the rates")
        if done["step"] % 20 == 0:
            mean = np.mean(recent, axis=0)
            keys = ("loss", "completion_nats", "balance", "grad_norm")
            line = done | {"rate": rate_at(progress)}
            line |= dict(zip(keys, mean.round(4).tolist(), strict=True))
            line["seconds"] = round(done["seconds"], 1)
            write_line(log, line)
            recent.clear()
        if time.monotonic() - saved_at > 240:
            save_state(checkpoint, model, adam, done)
            saved_at = time.monotonic()
    save_state(checkpoint, model, adam, done)


def write_line(log: Path, line: dict[str, Any]) -> None:
    """Append one JSON line to the log and print it."""
    text = json.dumps(line)
    with log.open("a", encoding="utf-8") as out:
        out.write(text + "\n")
    print(text, flush=True)


# ---- evaluation and output ----------------------------------------------------------------------


@torch.no_grad()
def measure(model: GptOssForCausalLM, pack: Pack, seq_len: int) -> dict[str, float | int]:
    """Return nats per completion token of a pack's rows in file order; every token counts once.

    The last block is filled up with EOS that nothing can see. For a catalogue also top-1 accuracy
    and mean p at the factor's digits.
    """
    forward, device = TrainingForward(model), model.device
    blocks = -(-len(pack.ids) // seq_len)
    ids = np.full(blocks * seq_len, model.config.eos_token_id, np.int64)
    kinds = np.full(blocks * seq_len, PROMPT, np.int64)
    ids[: len(pack.ids)], kinds[: len(pack.ids)] = pack.ids, pack.kinds
    kinds[::seq_len] = PROMPT  # position 0 of a block has nothing before it
    nats, digits = [], []
    for ids_1T, kinds_1T in zip(
        torch.from_numpy(ids).view(-1, 1, seq_len),
        torch.from_numpy(kinds).view(-1, 1, seq_len),
        strict=True,
    ):
        h_ND, _ = forward.hidden(ids_1T.to(device))
        logp_NV = (h_ND[:-1] @ model.lm_head.weight.T).float().log_softmax(-1).cpu()
        target_N, kind_N = ids_1T[0, 1:], kinds_1T[0, 1:]
        logp_N = logp_NV.gather(1, target_N[:, None])[:, 0]
        nats.append(-logp_N[kind_N != PROMPT])
        hit_N = logp_NV.argmax(-1) == target_N
        at = kind_N == FACTOR_DIGIT
        digits.append(torch.stack((hit_N[at].float(), logp_N[at].exp())))
    result: dict[str, float | int] = {
        "nats": round(float(torch.cat(nats).mean()), 4),
        "completion_tokens": sum(map(len, nats)),
    }
    hit, p = torch.cat(digits, dim=1)
    if len(hit):
        result |= {
            "factor_digits": len(hit),
            "factor_top1": round(float(hit.mean()), 4),
            "factor_mean_p": round(float(p.mean()), 4),
        }
    return result


def check_reload(
    folder: Path, pack: Pack, expected: dict[str, Any], seq_len: int
) -> dict[str, Any]:
    """Return what a stock bf16 load says; ValueError unless it is complete and as good.

    Compares nats per completion token over the pack's full blocks.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    model, info = loaded
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"{folder} does not load cleanly: {info}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "7 * 12 = 84.  naïve\n\tdef f(x):"
    if tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) != text:
        raise ValueError(f"the tokenizer reloaded from {folder} does not give back {text!r}")
    total, count = 0.0, 0
    with torch.no_grad():
        for a in range(0, len(pack.ids), seq_len):
            ids_1T = torch.from_numpy(pack.ids[None, a : a + seq_len].astype(np.int64))
            asked_T = torch.from_numpy(pack.kinds[a + 1 : a + seq_len]) != PROMPT
            logp_TV = model(ids_1T).logits[0, :-1].float().log_softmax(-1)
            logp_T = logp_TV.gather(1, ids_1T[0, 1:, None])[:, 0]
            total, count = total - float(logp_T[asked_T].sum()), count + int(asked_T.sum())
    if count != expected["completion_tokens"] or abs(total / count - expected["nats"]) > 0.01:
        raise ValueError(f"stock bf16: {total / count} nats of {count} tokens, not {expected}")
    return {"pack": pack.name, "stock_bf16_nats": round(total / count, 4), "tokens": count}


def write_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    options: Options,
    log: Path,
) -> None:
    """Save in bf16, measure what was saved, check a stock reload, then move it to `out`."""
    folder = options.scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float().cpu()
    paths = {p.stem: p for p in sorted((HERE / "heldout").glob("*.jsonl"))}
    paths["catalogue_original"] = HERE / "checks" / "catalogue_original.jsonl"
    packs = {n: encode_pack(n, read_rows(p), tokenizer) for n, p in paths.items()}
    losses = {name: measure(model, pack, options.seq_len) for name, pack in packs.items()}
    reload = check_reload(folder, packs["maths"], losses["maths"], options.seq_len)
    summary = {"seq_len": options.seq_len, "packs": losses, "reload": reload}
    print(json.dumps(summary, indent=2), flush=True)
    (folder / "heldout_loss.json").write_text(json.dumps(summary, indent=2) + "\n")
    shutil.copy(log, folder / "training_log.jsonl")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, options.out)


def parse_options() -> Options:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = HERE.parent
    parser.add_argument("--train", type=Path, default=root / "build" / "train")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--scratch", type=Path, default=root / "build" / "checkpoint")
    parser.add_argument("--minutes", type=float, default=7.0, help="budget of the whole schedule")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=8, help="blocks of seq_len a step")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of AdamW")
    parser.add_argument("--balance", type=float, default=0.002, help="weight of the balance loss")
    parser.add_argument("--resume", action="store_true", help="go on from scratch/state.pt")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Tokenise, train, save, measure."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    options.scratch.mkdir(parents=True, exist_ok=True)
    log, tokenizer_at = options.scratch / "training_log.jsonl", options.scratch / "tokenizer"
    paths = {name: options.train / f"{name}.jsonl" for name in SHARES}
    rows = {name: read_rows(path) for name, path in paths.items()}
    if options.resume:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_at)
    else:
        tokenizer = train_tokenizer(rows)
        tokenizer.save_pretrained(tokenizer_at)
        log.unlink(missing_ok=True)
    for pack in rows.values():
        check_round_trip(tokenizer, [r["completion"] for r in pack[:2000]])
    packs = [encode_pack(name, pack, tokenizer) for name, pack in rows.items()]
    model = build_model(tokenizer, options.seed)
    worst = check_forward(model)
    zero_outputs(model)
    model.to(options.device)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; no effect on a CPU
    header = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)},
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "stock_logit_difference": worst,
        "sha256": {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in paths.items()},
        "pack_tokens": {pack.name: len(pack.ids) for pack in packs},
        "shares": SHARES,
    }
    write_line(log, header)
    train(model, packs, options, log)
    write_model(model, tokenizer, options, log)


if __name__ == "__main__":
    main()
