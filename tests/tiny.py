"""Tiny random models with a tokenizer, saved as ordinary checkpoints."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "def add(a, b): return a + b",
    "the lamp stood on the hill and the light was good",
    "A crate of eggs: how many eggs are in 7 of them? 7 * 12 = 84.",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "norm_topk_prob": True,
    },
    "qwen3": {"intermediate_size": 48},
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 8},
}


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of about 300 tokens, saved in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_model(family: str, folder: Path, *, seed: int = 0, **config: Any) -> Any:
    """A random float32 model of `family` with its tokenizer, saved in `folder`."""
    tokenizer = save_tokenizer(folder)
    settings = {**_SIZE, **_FAMILY[family], "vocab_size": len(tokenizer), **config}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **settings)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # random biases and spread-out routers, not zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model
