"""Rows of text to packed blocks of tokens: the completion-only regime.

Rows of all packs are pooled, shuffled by a seed, rendered with the chat template, tokenised,
concatenated with EOS between, and cut into blocks of exactly `seq_len`. Only assistant content is
scored; the first token of a block never is, for nothing in the block predicts it.

Shapes: N blocks, S tokens a block.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eaftflow.errors import EaftflowError

SUFFIXES = (".jsonl", ".parquet")
_ROWS_PER_CALL = 256  # rows handed to the tokenizer at once
_MARKER = "\ue000{}\ue000"  # stands for a scored content: private-use characters, no white space


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A named set of rows: one or more files."""

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a pack: a chat whose assistant messages from `scored_from` on are scored, or text.

    `row` counts from 0 over the pack's files in order.
    """

    pack: str
    source: str
    row: int
    messages: tuple[Mapping[str, str], ...] = ()
    scored_from: int = 0
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Packed blocks. `scored_NS` marks targets; `row_NS` indexes `rows`."""

    token_NS: NDArray[np.int32]
    scored_NS: NDArray[np.bool_]
    row_NS: NDArray[np.int32]
    rows: Sequence[Row]
    dropped: Mapping[str, int]  # tokens or rows that do not count, by reason

    @property
    def predictions(self) -> int:
        """Targets in all blocks."""
        return int(self.scored_NS.sum())


def find_packs(specs: Sequence[str]) -> list[Pack]:
    """The packs that `--data` values name: `PATH` or `NAME=PATH`.

    A file is a pack called by its stem; a folder holds one pack a file, or is a single pack where a
    NAME is given. A name given twice gathers the files. Raises EaftflowError for what is missing.
    """
    found: dict[str, list[Path]] = {}
    for spec in specs:
        name, path = _split_spec(spec)
        files = _files_below(path)
        for file in files:
            found.setdefault(name or file.stem, []).append(file)
    return [Pack(name=name, files=tuple(files)) for name, files in found.items()]


def read_rows(pack: Pack) -> Iterator[Row]:
    """The rows of `pack`, in file order.

    Raises EaftflowError naming file and line for a broken line, unknown columns, or a wrong type.
    """
    number = 0
    for file in pack.files:
        records = _read_parquet(file) if file.suffix == ".parquet" else _read_jsonl(file)
        for where, record in records:
            yield _parse_record(record, where=where, pack=pack.name, row=number)
            number += 1


def pack_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    seq_len: int,
    seed: int = 0,
    budget: int | None = None,
) -> Blocks:
    """Blocks of `seq_len` tokens from `rows`, until `budget` predictions are reached.

    The last block may pass the budget: blocks are never cut. Raises EaftflowError where there is
    not one block, or no token to score.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    dropped: Counter[str] = Counter()
    token_buffer: list[int] = []
    scored_buffer: list[bool] = []
    row_buffer: list[int] = []
    blocks: list[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int32]]] = []
    predictions = 0
    for index, tokens, scored in _encode_rows(rows, order, tokenizer, dropped):
        token_buffer += [*tokens, tokenizer.eos_token_id]
        scored_buffer += [*scored, False]
        row_buffer += [index] * (len(tokens) + 1)
        while len(token_buffer) >= seq_len:
            dropped["scored tokens at position 0 of a block"] += scored_buffer[0]
            scored_buffer[0] = False
            blocks.append(
                (
                    np.array(token_buffer[:seq_len], dtype=np.int32),
                    np.array(scored_buffer[:seq_len], dtype=np.bool_),
                    np.array(row_buffer[:seq_len], dtype=np.int32),
                )
            )
            predictions += int(blocks[-1][1].sum())
            del token_buffer[:seq_len], scored_buffer[:seq_len], row_buffer[:seq_len]
            if budget is not None and predictions >= budget:
                return _stack(blocks, rows, dropped)
    dropped["scored tokens in the tail shorter than a block"] += sum(scored_buffer)
    if blocks and predictions:
        return _stack(blocks, rows, dropped)
    if blocks or not any(scored_buffer):
        raise EaftflowError(
            f"No completion tokens in {len(rows):,} rows: nothing to score. Give rows with a "
            "non-empty completion, assistant messages, or text."
        )
    raise EaftflowError(
        f"The data hold {len(token_buffer):,} tokens, fewer than one block of {seq_len:,}. "
        "Use a smaller --seq-len or give more data."
    )


def _stack(
    blocks: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int32]]],
    rows: Sequence[Row],
    dropped: Counter[str],
) -> Blocks:
    token_NS, scored_NS, row_NS = (np.stack(column) for column in zip(*blocks, strict=True))
    return Blocks(
        token_NS=token_NS,
        scored_NS=scored_NS,
        row_NS=row_NS,
        rows=rows,
        dropped={reason: count for reason, count in dropped.items() if count},
    )


# --- files to rows ---------------------------------------------------------------------------


def _split_spec(spec: str) -> tuple[str | None, Path]:
    name, separator, path = spec.partition("=")
    if separator and not Path(spec).exists():
        return name, Path(path)
    return None, Path(spec)


def _files_below(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise EaftflowError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
        return files
    if not path.is_file():
        raise EaftflowError(
            f"Data file {path} does not exist. Give --data PATH or --data NAME=PATH, a JSONL or "
            "Parquet file or a folder of them."
        )
    if path.suffix not in SUFFIXES:
        raise EaftflowError(
            f"{path} has the suffix {path.suffix!r}; data files are {' or '.join(SUFFIXES)}."
        )
    return [path]


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise EaftflowError(
                    f"{where} is not valid JSON ({error}). Mend or remove the line."
                ) from error
            if not isinstance(record, dict):
                raise EaftflowError(f"{where} holds a {type(record).__name__}, not an object.")
            yield where, record


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow raises ArrowInvalid, a ValueError
        raise EaftflowError(f"{file} is not a readable Parquet file ({error}).") from error
    number = 0
    for batch in table.iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", record


def _parse_record(record: dict[str, Any], *, where: str, pack: str, row: int) -> Row:
    source = record.get("source") or ""
    if not isinstance(source, str):
        raise EaftflowError(f"{where}: `source` is a {type(source).__name__}, not a string.")
    if "prompt" in record and "completion" in record:
        prompt = _messages(record["prompt"], role="user", column="prompt", where=where)
        completion = _messages(
            record["completion"], role="assistant", column="completion", where=where
        )
        messages, scored_from = prompt + completion, len(prompt)
    elif "messages" in record:
        messages = _messages(record["messages"], role="", column="messages", where=where)
        scored_from = 0
    elif isinstance(record.get("text"), str):
        return Row(pack=pack, source=source, row=row, text=record["text"])
    else:
        raise EaftflowError(
            f"{where} has the columns {', '.join(sorted(record)) or '(none)'}; a row needs "
            "`prompt` and `completion`, or `messages`, or a string `text`."
        )
    return Row(pack=pack, source=source, row=row, messages=messages, scored_from=scored_from)


def _messages(
    value: object, *, role: str, column: str, where: str
) -> tuple[Mapping[str, str], ...]:
    """A string as one message of `role`, or a list of messages as it is."""
    if isinstance(value, str) and role:
        return ({"role": role, "content": value},)
    if isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    ):
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    expected = "a string or a list" if role else "a list"
    raise EaftflowError(
        f"{where}: `{column}` must be {expected} of messages with a text `role` and `content`, "
        f"found {type(value).__name__} {str(value)[:60]!r}."
    )


# --- rows to tokens --------------------------------------------------------------------------


def _encode_rows(
    rows: Sequence[Row], order: Sequence[int], tokenizer: Any, dropped: Counter[str]
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """`(row index, tokens, scored)` for every row that renders; the others are counted."""
    for start in range(0, len(order), _ROWS_PER_CALL):
        rendered = []
        for index in order[start : start + _ROWS_PER_CALL]:
            text, spans = render_row(rows[index], tokenizer)
            if spans:
                rendered.append((index, text, spans))
            else:
                dropped["rows without a completion, or altered by the chat template"] += 1
        if not rendered:
            continue
        encoded = tokenizer(
            [text for _, text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for (index, _, spans), tokens, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield index, tokens, _scored_tokens(offsets, spans)


def render_row(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of `row` as the model sees it, and the character spans that are scored.

    The spans are found by rendering the chat a second time with markers in place of the scored
    contents: what stands between the markers is template. A row with nothing to score, or whose
    contents the template does not render verbatim (but for outer white space), has no spans.
    """
    if row.text is not None:
        return row.text, [(0, len(row.text))] if row.text else []
    scored = {
        number: message["content"]
        for number, message in enumerate(row.messages)
        if number >= row.scored_from and message["role"] == "assistant" and message["content"]
    }
    text = _render(row.messages, tokenizer)
    marked = _render(
        [
            {**message, "content": _MARKER.format(number)} if number in scored else message
            for number, message in enumerate(row.messages)
        ],
        tokenizer,
    )
    spans: list[tuple[int, int]] = []
    cursor = 0
    for number, content in scored.items():
        template, _, marked = marked.partition(_MARKER.format(number))
        start = cursor + len(template)
        end = start + len(content)
        if text[start:end] != content:
            content = content.strip()
            end = start + len(content)
        if text[cursor:end] != template + content:
            return text, []
        spans.append((start, end))
        cursor = end
    return text, spans if text[cursor:] == marked else []


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return "".join(message["content"] for message in messages)
    return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))


def _scored_tokens(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[bool]:
    """Which tokens lie wholly inside a span, and hold text at all."""
    scored = [False] * len(offsets)
    cursor = 0
    for index, (start, end) in enumerate(offsets):
        while cursor < len(spans) and spans[cursor][1] <= start:
            cursor += 1
        if cursor == len(spans):
            break
        scored[index] = start < end and spans[cursor][0] <= start and end <= spans[cursor][1]
    return scored
