"""Rows of text to packed blocks of tokens: the completion-only regime.

Rows of all packs are pooled, shuffled by a seed, rendered with the chat template, tokenised,
concatenated with EOS between, and cut into blocks of exactly `seq_len`. Only assistant content is
scored; the first token of a block never is, for nothing in the block predicts it.

Shapes: N blocks, S tokens a block.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
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
        whole = len(token_buffer) // seq_len * seq_len
        for first in range(0, whole, seq_len):
            dropped["scored tokens at position 0 of a block"] += scored_buffer[first]
            scored_buffer[first] = False
            cut = slice(first, first + seq_len)
            blocks.append(
                (
                    np.array(token_buffer[cut], dtype=np.int32),
                    np.array(scored_buffer[cut], dtype=np.bool_),
                    np.array(row_buffer[cut], dtype=np.int32),
                )
            )
            predictions += int(blocks[-1][1].sum())
            if budget is not None and predictions >= budget:
                return _stack(blocks, rows, dropped)
        del token_buffer[:whole], scored_buffer[:whole], row_buffer[:whole]
    dropped["scored tokens in the tail shorter than a block"] += sum(scored_buffer)
    if blocks and predictions:
        return _stack(blocks, rows, dropped)
    if blocks or not any(scored_buffer):
        lost = "".join(
            f" Most often dropped: {count:,} {reason.removesuffix('.')}."
            for reason, count in (+dropped).most_common(1)
        )
        raise EaftflowError(
            f"No completion tokens in {len(rows):,} rows: nothing to score.{lost} Give rows with a "
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
    if not separator or Path(spec).exists():
        return None, _given(spec, spec)
    return name, _given(path, spec)


def _given(path: str, spec: str) -> Path:
    """`path`, which must not be empty: an empty one would mean the current directory."""
    if not path:
        raise EaftflowError(
            f"--data {spec!r} holds no path. Give --data PATH or --data NAME=PATH; for the current "
            "directory the path is a dot."
        )
    return Path(path)


def _files_below(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file()
        )
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
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # also too many digits, too deep a nest
                raise EaftflowError(
                    f"{where} is not valid JSON in UTF-8 ({error}). Mend or remove the line, or "
                    "save the file as UTF-8."
                ) from error
            if not isinstance(record, dict):
                raise EaftflowError(f"{where} holds a {type(record).__name__}, not an object.")
            yield where, record


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches():
            for index in range(batch.num_rows):
                number += 1
                [record] = batch.slice(index, 1).to_pylist()
                yield f"{file}, row {number}", record
    except UnicodeDecodeError as error:
        raise EaftflowError(
            f"{file}, row {number} holds text that is not UTF-8 ({error}). Mend or remove the row."
        ) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise EaftflowError(f"{file} is not a readable Parquet file ({error}).") from error


def _parse_record(record: dict[str, Any], *, where: str, pack: str, row: int) -> Row:
    record = {column: value for column, value in record.items() if value is not None}
    source = record.get("source") or ""
    if not isinstance(source, str):
        raise EaftflowError(f"{where}: `source` is a {type(source).__name__}, not a string.")
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    scored_from = 0
    if "prompt" in record and "completion" in record:
        prompt = _messages(record["prompt"], role="user", column="prompt", where=where)
        completion = _messages(
            record["completion"], role="assistant", column="completion", where=where
        )
        messages, scored_from = prompt + completion, len(prompt)
    elif "messages" in record:
        messages = _messages(record["messages"], role="", column="messages", where=where)
    elif isinstance(record.get("text"), str):
        text = record["text"]
    else:
        raise EaftflowError(
            f"{where} has the columns {', '.join(sorted(record)) or '(none)'}; a row needs "
            "`prompt` and `completion`, or `messages`, or a string `text` (null counts as absent)."
        )
    for string in (source, text or "", *(s for m in messages for s in m.values())):
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise EaftflowError(
                f"{where} holds text that UTF-8 cannot encode ({error}). Mend or remove the row."
            ) from error
    return Row(
        pack=pack, source=source, row=row, messages=messages, scored_from=scored_from, text=text
    )


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
            try:
                text, spans = render_row(rows[index], tokenizer)
            except jinja2.TemplateError as error:
                message, _, _ = str(error).partition("\n")
                dropped[f"rows that the chat template refuses: {message}"] += 1
                continue
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
        for (index, text, spans), tokens, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield index, tokens, _scored_tokens(text, offsets, spans)


def render_row(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of `row` as the model sees it, and the character spans that are scored.

    The spans are found by rendering the chat a second time with markers in place of the scored
    contents: what stands between the markers is template. A row with nothing to score, or whose
    contents the template does not render verbatim (but for outer white space), has no spans.
    Raises jinja2.TemplateError where the template refuses the row, and EaftflowError for a template
    that cannot be used at all.
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
    before, *after = _split_at_markers(marked, scored)
    if not text.startswith(before):
        return text, []
    spans: list[tuple[int, int]] = []
    cursor = len(before)
    for content, template in zip(scored.values(), after, strict=True):
        for kept in (content, content.lstrip(), content.rstrip(), content.strip()):
            if text.startswith(kept + template, cursor):
                break
        else:
            return text, []
        if kept:
            spans.append((cursor, cursor + len(kept)))
        cursor += len(kept) + len(template)
    return text, spans if cursor == len(text) else []


def _split_at_markers(marked: str, numbers: Iterable[int]) -> list[str]:
    """The template text before, between and after the markers of `numbers`."""
    pieces = []
    for number in numbers:
        piece, _, marked = marked.partition(_MARKER.format(number))
        pieces.append(piece)
    return [*pieces, marked]


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return "".join(message["content"] for message in messages)
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))
    except (jinja2.TemplateSyntaxError, ValueError) as error:  # ValueError: names, but no default
        raise EaftflowError(
            f"The tokenizer's chat template cannot be used ({error}). Mend it in the model's "
            "folder, or remove it to have the messages joined as they are."
        ) from error


def _scored_tokens(
    text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[bool]:
    """Which tokens cover text of the spans and, outside them, white space at most.

    Offsets may leave out white space that the token holds, down to `(end, end)` for a token of
    white space alone. So a token also covers the white space between its predecessor and itself,
    and an empty one the character before it.
    """
    inside = bytearray(len(text))
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    foreign = bytes(
        not held and not character.isspace() for held, character in zip(inside, text, strict=True)
    )
    scored = []
    covered = 0
    for start, end in offsets:
        gap = text[covered:start]
        first = min(start - len(gap) + len(gap.rstrip()), end - 1)
        scored.append(1 in inside[first:end] and 1 not in foreign[first:end])
        covered = end
    return scored


def resolve_spec(spec: str) -> str:
    """The `--data` value `spec` with its path made absolute."""
    name, path = _split_spec(spec)
    return str(path.resolve()) if name is None else f"{name}={path.resolve()}"
