"""Models and tokenizers, found and loaded: local folders and hub names alike."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from eaftflow.attention import choose_attention
from eaftflow.errors import EaftflowError
from eaftflow.resources import resource

BUNDLED_MODEL = "data/model"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model's files in a local folder, and where they came from."""

    name: str
    path: Path
    revision: str | None = None  # the hub's commit; None for a local folder


def find_model(name: str | None, *, revision: str | None = None) -> Snapshot:
    """The files of the local folder or hub model `name`; the bundled model where it is None.

    Raises EaftflowError where there is no such folder and the hub and its cache have no such name.
    """
    if name is None:
        return Snapshot(name="bundled", path=resource(BUNDLED_MODEL))
    if Path(name).is_dir() and revision is not None:
        raise EaftflowError(
            f"revision={revision} is of a hub model, but {name} is a local folder. Leave it out."
        )
    if Path(name).is_dir():
        return Snapshot(name=Path(name).resolve().name, path=Path(name))
    try:
        path = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EaftflowError(
            f"Model {name} is neither a local folder nor to be had from the hub or its cache "
            f"({type(error).__name__}: {_first_line(error)}). Check the spelling, or give the path "
            "of a folder that holds config.json."
        ) from error
    return Snapshot(name=name, path=Path(path), revision=Path(path).name)


def load_config(snapshot: Snapshot, *, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises EaftflowError where config.json is missing or unusable."""
    if not (snapshot.path / "config.json").is_file():
        raise EaftflowError(
            f"{snapshot.path} has no config.json. Give the folder of a Hugging Face checkpoint."
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            snapshot.path, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise EaftflowError(
            f"{snapshot.path}/config.json is not usable: {_first_line(error)}. "
            "Mend it, or update transformers for a newer model."
        ) from error


def load_tokenizer(snapshot: Snapshot, *, trust_remote_code: bool) -> Any:
    """The model's tokenizer.

    Raises EaftflowError where there is none, or it lacks character offsets or an EOS token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            snapshot.path, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise EaftflowError(
            f"{snapshot.path} has no usable tokenizer: {_first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise EaftflowError(
            f"{type(tokenizer).__name__} gives no character offsets, which mark the completion's "
            "tokens. Use a checkpoint with a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise EaftflowError(
            f"The tokenizer in {snapshot.path} has no EOS token to put between rows. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def hash_tokenizer(tokenizer: Any) -> str:
    """The SHA-256 of everything that turns text into ids: vocabulary, merges, rules, template."""
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def decode_vocabulary(tokenizer: Any) -> Sequence[str]:
    """The text of every token id alone; bytes that are no whole character become U+FFFD."""
    texts: Sequence[str] = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return texts


def load_model(
    snapshot: Snapshot, config: Any, *, device: str, dtype: str, trust_remote_code: bool
) -> Any:
    """The model in evaluation mode on `device`, with every weight read from the checkpoint.

    `dtype` "auto" is the checkpoint's. MXFP4 weights are dequantised, for their kernels bypass the
    experts modules. Raises EaftflowError where the checkpoint does not fill the model.
    """
    options: dict[str, Any] = {"dtype": dtype}
    quantization: Any = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if device != "cpu" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}
    transformers_logging.disable_progress_bar()
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            snapshot.path,
            config=config,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise EaftflowError(f"{snapshot.path} does not load: {_first_line(error)}") from error
    unfilled = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if unfilled:
        raise EaftflowError(
            f"{snapshot.path} leaves {len(unfilled)} tensors of {type(model).__name__} without "
            f"weights, {unfilled[0]} among them: they would be random. The checkpoint does not "
            "fit its config.json, or was saved by a tool that renamed tensors."
        )
    attention = choose_attention(type(model), device)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model.to(device).eval()


def choose_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """The device and dtype to run on: by default CUDA and the checkpoint's, else CPU and float32.

    Raises EaftflowError for a device this machine lacks, or an unknown dtype.
    """
    if dtype not in (None, "auto", *_DTYPES):
        raise EaftflowError(f"dtype={dtype} is unknown. Use one of auto, {', '.join(_DTYPES)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        meta = torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EaftflowError(
            f"device={device} cannot be used on this machine: {_first_line(error)}. Use cpu"
            f"{' or cuda' if torch.cuda.is_available() else ''}."
        ) from error
    if meta:
        raise EaftflowError("device=meta holds no values, so nothing can run on it. Use cpu.")
    return device, dtype or ("float32" if device == "cpu" else "auto")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
