"""Rows to blocks: what is scored, what is dropped, and every wrong file by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import TEMPLATE, save_tokenizer

from eaftflow.errors import EaftflowError
from eaftflow.packing import Pack, Row, find_packs, pack_rows, read_rows, render_row

HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
)
STRIPPING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return save_tokenizer(tmp_path / "tokenizer")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Row]:
    return list(read_rows(Pack(name="p", files=(path,))))


def chat(*contents: str, scored_from: int = 0) -> Row:
    messages = tuple(
        {"role": "assistant" if index % 2 else "user", "content": content}
        for index, content in enumerate(contents)
    )
    return Row(pack="p", source="", row=0, messages=messages, scored_from=scored_from)


def test_packing_by_hand(tokenizer: Any) -> None:
    """Two rows of 'ab' -> 'cd' in blocks of 7: which targets count, and which are lost where."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [chat("ab", "cd"), chat("ab", "cd")]
    blocks = pack_rows(rows, tokenizer, seq_len=7)
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    # a b c d EOS a b | c d EOS: the second row's c is at position 0, its d in the tail
    assert blocks.token_NS.tolist() == [[a, b, c, d, 0, a, b]]
    assert blocks.scored_NS.tolist() == [[False, False, True, True, False, False, False]]
    assert blocks.row_NS[0, :5].tolist() == [blocks.row_NS[0, 0]] * 5
    assert blocks.predictions == 2
    assert blocks.dropped == {"scored tokens in the tail shorter than a block": 2}
    longer = pack_rows(rows * 2, tokenizer, seq_len=7)
    assert longer.dropped["scored tokens at position 0 of a block"] == 1


@pytest.mark.parametrize("template", [TEMPLATE, HARMONY, STRIPPING, None])
def test_only_assistant_content_is_scored(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    # contents that also stand in the template or in the prompt
    for prompt, completion in [("user a", "a"), ("final", "final"), ("7 of 7", " 7 "), ("x", "x")]:
        text, spans = render_row(chat(prompt, completion), tokenizer)
        [(start, end)] = spans
        assert text[start:end] in (completion, completion.strip())
        assert start >= text.index(prompt) + len(prompt)


def test_several_turns_score_every_assistant_message(tokenizer: Any) -> None:
    text, spans = render_row(chat("q", "one", "q", "two"), tokenizer)
    assert [text[start:end] for start, end in spans] == ["one", "two"]
    text, spans = render_row(chat("q", "one", "q", "two", scored_from=3), tokenizer)
    assert [text[start:end] for start, end in spans] == ["two"]


def test_rows_that_the_template_alters_are_dropped_and_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = SHOUTING
    rows = [chat("q", "loud")] * 3 + [Row(pack="p", source="", row=3, text="plain " * 20)]
    blocks = pack_rows(rows, tokenizer, seq_len=8)
    assert blocks.dropped["rows without a completion, or altered by the chat template"] == 3


def test_plain_text_counts_every_token(tokenizer: Any) -> None:
    rows = [Row(pack="p", source="", row=0, text="the lamp stood on the hill")]
    blocks = pack_rows(rows, tokenizer, seq_len=4)
    assert blocks.scored_NS[0].tolist() == [False, True, True, True]


def test_budget_stops_after_the_block_that_reaches_it(tokenizer: Any) -> None:
    rows = [chat("the lamp", "stood on the hill and the light was good")] * 50
    whole = pack_rows(rows, tokenizer, seq_len=16)
    some = pack_rows(rows, tokenizer, seq_len=16, budget=30)
    assert 30 <= some.predictions < 30 + 16
    assert (whole.token_NS[: len(some.token_NS)] == some.token_NS).all()


def test_shuffle_follows_the_seed_alone(tokenizer: Any) -> None:
    rows = [chat(f"q{number}", f"answer {number}") for number in range(40)]
    first, same, other = (
        pack_rows(rows, tokenizer, seq_len=16, seed=seed).token_NS for seed in (0, 0, 1)
    )
    assert (first == same).all()
    assert first.shape != other.shape or not (first == other).all()


def test_nothing_to_score_is_refused(tokenizer: Any) -> None:
    with pytest.raises(EaftflowError, match="fewer than one block of 64"):
        pack_rows([chat("q", "short")], tokenizer, seq_len=64)
    with pytest.raises(EaftflowError, match="No completion tokens in 9 rows"):
        pack_rows([chat("a long prompt", "")] * 9, tokenizer, seq_len=4)


def test_the_three_kinds_of_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "p", "completion": "c", "source": "s"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        {"text": "t", "other": 1},
        {"prompt": [{"role": "user", "content": "u"}], "completion": "c"},
    )
    pair, messages, text, mixed = read(path)
    assert pair.messages[1] == {"role": "assistant", "content": "c"}
    assert (pair.scored_from, pair.source, pair.row) == (1, "s", 0)
    assert (len(messages.messages), messages.scored_from, messages.row) == (2, 0, 1)
    assert (text.text, text.messages) == ("t", ())
    assert mixed.scored_from == 1


def test_parquet_rows_equal_jsonl_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "source": "s"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == read(write(tmp_path / "rows.jsonl", *rows))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "compl', "rows.jsonl, line 2 is not valid JSON"),
        ("[1]", "line 2 holds a list, not an object"),
        ('{"question": "q"}', "line 2 has the columns question; a row needs"),
        ('{"prompt": 3, "completion": "c"}', "line 2: `prompt` must be a string or a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: `messages` must be a list of messages"),
        ('{"text": "t", "source": 3}', "line 2: `source` is a int, not a string"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(EaftflowError, match=message):
        read(path)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(EaftflowError, match=r"rows\.parquet is not a readable Parquet file"):
        read(tmp_path / "rows.parquet")


def test_packs_from_files_folders_and_names(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", {}), write(tmp_path / "b.jsonl", {})
    packs = find_packs([str(tmp_path), f"both={tmp_path}", f"b={a}"])
    assert [(pack.name, pack.files) for pack in packs] == [
        ("a", (a,)),
        ("b", (b, a)),
        ("both", (a, b)),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope.jsonl", "does not exist"),
        ("x=nope", "nope does not exist"),
        ("c.csv", "suffix '.csv'"),
    ],
)
def test_missing_and_strange_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text("")
    with pytest.raises(EaftflowError, match=message):
        find_packs([spec])
