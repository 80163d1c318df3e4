"""Rows of a file -> official sequences; bad rows by line; what is too long is cut where the rules say."""

from __future__ import annotations

import json

import pytest

from finetune.collators import ExampleCollator
from finetune.data import Columns, Exchange, Sizes, encode, encode_all, read_exchanges

IGNORED = -100


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_official_columns_messages_and_dialogues_say_the_same(tokenizer, tmp_path):
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": "c", "response": "d", "history": [["a", "b"]]},
        {"messages": [*turn, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        {"rounds": [{"ask": ["a", "A"], "answer": "b"}, {"ask": ["c"], "answer": "d"}]},
        {"content": "c", "summary": "d", "earlier": [["a", "b"]]},
    ]
    found = [read_exchanges(write(tmp_path / "x", [row]), tokenizer) for row in rows[:3]]
    found.append(read_exchanges(write(tmp_path / "x", rows[3:]), tokenizer, Columns("content", "summary", "earlier")))
    assert [[one.query for one in of_row] for of_row in found] == [["c"], ["a", "c"], ["a", "A", "c"], ["c"]]
    assert len({tuple(encode(of_row[-1], tokenizer).ids) for of_row in found}) == 1


def test_the_sequence_is_the_official_one(tokenizer):
    one = encode(Exchange("c", [("a", "b")], "d", 1), tokenizer)
    prompt = tokenizer.encode("[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：", add_special_tokens=False)
    answer = tokenizer.encode("d", add_special_tokens=False)
    assert one.ids == tokenizer.build_inputs_with_special_tokens(prompt, answer)
    context_length = one.ids.index(tokenizer.bos_token_id)
    assert one.labels == [IGNORED] * context_length + one.ids[context_length:]
    assert one.ids[context_length - 1] == tokenizer.gmask_token_id and one.ids[-1] == tokenizer.eos_token_id


def test_a_system_message_and_typed_control_tokens_are_text(tokenizer):
    history = [{"role": "system", "content": "be brief"}]
    ids = encode(Exchange("<eop> [gMASK]", history, "<sop>", 1), tokenizer).ids
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.gmask_token_id) == 1
    assert tokenizer.decode(ids).startswith("be brief\n<eop>")


BAD = {
    "{": "line 2: Expecting",
    '["prompt"]': "line 2: a list, not an object",
    '{"question": "a"}': "line 2: no column 'prompt' among ['question'] (--prompt-column names another)",
    '{"prompt": "a"}': "line 2: the response is None, no text",
    '{"prompt": "", "response": "b"}': "line 2: the prompt is '', no text",
    '{"prompt": 3, "response": "b"}': "line 2: the prompt is 3, no text",
    '{"prompt": "a", "response": "b", "history": ["x"]}': "line 2: Round 0 is 'x', not a (query, answer) pair.",
    '{"prompt": "a", "response": "b", "history": [["x", null]]}': "line 2: The history ends with the query 'x'",
    '{"messages": []}': "line 2: 'messages' is no list of objects",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 2: the response is None, no text",
    '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user"}]}': "line 2: message 0 is an",
    '{"rounds": [{"answer": "b"}]}': "line 2: 'rounds' is no list",
    '{"rounds": [{"ask": "ab", "answer": "b"}]}': "line 2: 'rounds' is no list",
    '{"prompt": "\\ud800", "response": "b"}': "line 2: 'utf-8' codec can't encode",
}


@pytest.mark.parametrize("row, message", BAD.items(), ids=BAD)
def test_a_bad_row_is_named_by_its_line(tokenizer, tmp_path, row, message):
    good = {"prompt": "a", "response": "b"}
    path = write(tmp_path / "x", [good, row, good])
    with pytest.raises(ValueError) as caught:
        read_exchanges(path, tokenizer)
    assert message in str(caught.value) and "1 rows cannot be used" in str(caught.value)
    assert [one.line for one in read_exchanges(path, tokenizer, skip_bad=True)] == [1, 3]


def test_many_bad_rows_are_counted_and_a_file_without_good_ones_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="12 rows cannot be used(.|\n)*line 10(.|\n)*and 2 more"):
        read_exchanges(write(tmp_path / "x", ["{"] * 12), tokenizer, skip_bad=True)
    with pytest.raises(ValueError, match="holds no rows"):
        read_exchanges(write(tmp_path / "y", ["", " "]), tokenizer)


def test_the_oldest_rounds_go_first_then_the_end_of_the_query(tokenizer, capsys):
    rounds = [(f"question {n}", f"answer {n}") for n in range(6)]
    whole = encode(Exchange("and now", rounds, "yes", 7), tokenizer)
    newest = tokenizer.build_chat_input_ids("and now", rounds[-2:])
    fits = Sizes(source=len(newest) - 1, target=8)
    cut = encode(Exchange("and now", rounds, "yes", 7), tokenizer, fits)
    assert whole.lost == "" and cut.lost == "rounds" and cut.ids[: len(newest)] == newest
    turns = [{"role": role, "content": text} for pair in rounds for role, text in zip(("user", "assistant"), pair)]
    system = {"role": "system", "content": "be brief"}  # stays
    newest = tokenizer.build_chat_input_ids("and now", [system, *turns[-4:]])
    cut = encode(Exchange("and now", [system, *turns], "yes", 7), tokenizer, Sizes(len(newest) - 1, target=8))
    assert cut.lost == "rounds" and cut.ids[: len(newest)] == newest
    long = Exchange("one two three four five six", rounds, "a b c d e f g h", 8)
    short = encode(long, tokenizer, Sizes(source=5, target=99))
    alone = tokenizer.build_chat_input_ids(long.query)
    assert short.lost == "query" and short.ids[:6] == [*alone[:4], *alone[-2:]]
    ended = encode(long, tokenizer, Sizes(source=999, target=5))
    assert ended.lost == "answer" and len([label for label in ended.labels if label != IGNORED]) == 5
    assert ended.ids[-1] == tokenizer.eos_token_id
    encode_all([long, long], tokenizer, Sizes(source=5, target=99))
    assert (
        "2 of 2 examples with the end of the query cut off (--max-source), line 8 for one" in capsys.readouterr().out
    )


def test_a_batch_is_padded_on_the_right_without_labels(tokenizer):
    short, long = (encode(Exchange("a", [], text, 1), tokenizer) for text in ("b", "b and much more"))
    batch = ExampleCollator(tokenizer)([short, long])
    assert {rows.shape for rows in batch.values()} == {(2, len(long.ids))}
    n = len(short.ids)
    assert batch["input_ids"][0].tolist() == short.ids + [tokenizer.pad_token_id] * (len(long.ids) - n)
    assert (batch["labels"][0, n:] == IGNORED).all() and batch["attention_mask"].sum(dim=1).tolist() == [
        n,
        len(long.ids),
    ]


def test_padding_changes_no_loss(load, tokenizer):
    one, other = (encode(Exchange("你好", [], text, 1), tokenizer) for text in ("好", "你好，我是一个长一些的回答"))
    collate, model = ExampleCollator(tokenizer), load()
    alone = [model(**collate([example]), num_items_in_batch=1).loss for example in (one, other)]
    together = model(**collate([one, other]), num_items_in_batch=1).loss
    assert abs(float(together - sum(alone))) < 1e-4 * float(together)
