"""Rows to blocks: what is scored, what is dropped, and every wrong file by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tiny import TEMPLATE, save_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from eaftflow.errors import EaftflowError
from eaftflow.packing import Pack, Row, find_packs, pack_rows, read_rows, render_row

HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
)
STRIPPING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
RSTRIPPING = "{% for m in messages %}<{{ m.role }}>{{ m.content.rstrip() }}</s>{% endfor %}"
LSTRIPPING = "{% for m in messages %}<{{ m.role }}>{{ m.content.lstrip() }} {% endfor %}"
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported\\nfor ' + m.content) }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
SPECIAL = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
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


def scored(row: Row, tokenizer: Any) -> list[str]:
    """The scored tokens of `row` in one block of its own length; text rows lose their first."""
    text, _ = render_row(row, tokenizer)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    blocks = pack_rows([row], tokenizer, seq_len=length)
    return list(tokenizer.convert_ids_to_tokens(blocks.token_NS[blocks.scored_NS].tolist()))


def word_tokenizer(model: Any, trainer: Any, pre_tokenizer: Any) -> Any:
    """A tokenizer that knows whole words of a small text, and the Llama-2 template."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(["[INST] how many [/INST] hello world"] * 8, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = LLAMA_2
    return fast


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


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_trimmed_offsets_score_the_same_tokens(tokenizer: Any, *, add_prefix_space: bool) -> None:
    code = " def f(a):\n\n    if a:\n        return a  \n    return 7\n "
    rows = [chat(" x\n ", code, "\n y ", "  7  "), Row(pack="p", source="", row=0, text=code)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space
    )
    tokens = []
    for trim in (False, True):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        tokens.append([scored(row, tokenizer) for row in rows])
    whole, trimmed = tokens
    assert whole == trimmed
    assert whole[0].count("Ġ") > 10
    assert "<|end|>" not in whole[0]


def test_a_token_may_start_with_white_space_of_the_template() -> None:
    tokenizer = word_tokenizer(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=200, **SPECIAL),
        pre_tokenizers.Metaspace(),
    )
    assert scored(chat("how many", "hello  world"), tokenizer) == ["▁hello", "▁", "▁world"]


def test_words_without_white_space_are_scored_up_to_the_template() -> None:
    tokenizer = word_tokenizer(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=200, **SPECIAL),
        pre_tokenizers.Whitespace(),
    )
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "</s>")
    assert scored(chat("how many", " hello  world "), tokenizer) == ["hello", "world"]
    tokenizer.chat_template = None  # one scored content right after another
    messages = tuple({"role": "assistant", "content": f" {word} "} for word in ("hello", "world"))
    row = Row(pack="p", source="", row=0, messages=({"role": "user", "content": "many"}, *messages))
    assert scored(row, tokenizer) == ["hello", "world"]


@pytest.mark.parametrize(
    ("template", "content", "kept"),
    [
        (LLAMA_2, "hello ", "hello"),
        (LLAMA_2, "\n hello  ", "hello"),
        (STRIPPING, "hello\n", "hello"),
        (STRIPPING, "\nhello\n\n", "hello"),
        (RSTRIPPING, " hello\n", " hello"),
        (LSTRIPPING, " hello  ", "hello  "),
        (TEMPLATE, " hello\n", " hello\n"),
    ],
)
def test_contents_survive_the_loss_of_outer_white_space(
    tokenizer: Any, template: str, content: str, kept: str
) -> None:
    tokenizer.chat_template = template
    for turns, row in (
        (1, chat("q", content)),
        (2, chat("q", content, "hello", content)),
    ):
        text, spans = render_row(row, tokenizer)
        assert [text[start:end] for start, end in spans] == [kept] * turns


def test_a_completion_of_white_space_that_the_template_trims_is_dropped(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA_2
    rows = [chat("q", " \n")] * 3 + [chat("q", "hello")] * 3
    blocks = pack_rows(rows, tokenizer, seq_len=16)
    assert blocks.dropped["rows without a completion, or altered by the chat template"] == 3


def test_rows_that_the_template_refuses_are_counted_by_its_message(tokenizer: Any) -> None:
    tokenizer.chat_template = REFUSING
    refused = [
        Row(pack="p", source="", row=0, messages=({"role": "system", "content": content},))
        for content in "abc"
    ]
    reason = "rows that the chat template refuses: System role not supported"
    blocks = pack_rows([*refused, chat("q", "hello")], tokenizer, seq_len=8)
    assert blocks.dropped[reason] == 3
    with pytest.raises(EaftflowError, match=f"No completion tokens in 3 rows.* 3 {reason}"):
        pack_rows(refused, tokenizer, seq_len=8)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ messages[0] }", "unexpected '}'"), ({"tool_use": "x"}, "no default")],
)
def test_a_template_that_cannot_be_used_is_one_error(
    tokenizer: Any, template: object, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(EaftflowError, match=f"chat template cannot be used .*{message}"):
        pack_rows([chat("q", "hello")], tokenizer, seq_len=8)


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


def test_null_columns_count_as_absent(tmp_path: Path) -> None:
    kinds = [
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"text": "t"},
    ]
    columns = ("prompt", "completion", "messages", "text", "source")
    rows = [{column: kind.get(column) for column in columns} for kind in kinds]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = read(write(tmp_path / "kinds.jsonl", *kinds))
    assert read(tmp_path / "rows.parquet") == expected
    assert read(write(tmp_path / "rows.jsonl", *rows)) == expected


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
        ('{"text": ' + "7" * 5000 + "}", "line 2 is not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "line 2 is not valid JSON"),
        (r'{"text": "\ud83d"}', "line 2 holds text that UTF-8 cannot encode"),
        (r'{"text": "t", "source": "\ud83d"}', "line 2 holds text that UTF-8 cannot encode"),
        (r'{"prompt": "p", "completion": "\ud83d"}', "line 2 holds text that UTF-8 cannot"),
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


def test_a_corrupt_parquet_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["the lamp stood on the hill"] * 99}), path)
    path.write_bytes(b"PAR1" + b"\xff" * 60 + path.read_bytes()[64:])
    with pytest.raises(EaftflowError, match=r"rows\.parquet is not a readable Parquet file"):
        read(path)


def test_parquet_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"\xed\xa0\xbd"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    with pytest.raises(EaftflowError, match=r"rows\.parquet, row 2 holds text that is not UTF-8"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_files_must_be_utf8(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "t"}'.encode(encoding))
    with pytest.raises(EaftflowError, match="line 1 is not valid JSON in UTF-8"):
        read(path)
    path.write_bytes('{"text": "t"}'.encode("utf-8-sig"))
    assert [row.text for row in read(path)] == ["t"]


def test_packs_from_files_folders_and_names(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", {}), write(tmp_path / "b.jsonl", {})
    (tmp_path / "folder.jsonl").mkdir()
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
        ("", "--data '' holds no path"),
        ("code=", "--data 'code=' holds no path"),
    ],
)
def test_missing_and_strange_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text("")
    Path("here.jsonl").write_text("")
    with pytest.raises(EaftflowError, match=message):
        find_packs([spec])
