"""Constrained answers are valid whatever the model would rather say; schemas of strangers do no harm."""

from __future__ import annotations

import json

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from serving.batching import Batch, Generation  # noqa: E402
from serving.grammar import GrammarError, json_grammars  # noqa: E402
from serving.sampling import Sampling  # noqa: E402

TEXT, WHOLE = {"type": "string", "maxLength": 12}, {"type": "integer", "minimum": 0, "maximum": 999}
FLAG, NOTHING = {"type": "boolean"}, {"type": "null"}


def record(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def several(items, most=3):
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


SCHEMAS = [
    record(a=TEXT),
    record(名字=TEXT, 年龄=WHOLE),
    record(x=FLAG, y=NOTHING),
    several(WHOLE),
    several(TEXT),
    record(tags=several(TEXT)),
    record(a=record(b=record(c=WHOLE))),
    {"enum": ["红", "green", "🍵"]},
    record(c={"enum": ["北京", "上海", "new york"]}),
    record(city={"const": "a\nb\tc  d"}),
    several(several(FLAG)),
    record(p={"anyOf": [WHOLE, TEXT]}),
    record(v={"type": "number", "minimum": 0, "maximum": 5}),
    record(v={"type": "number"}, w={"type": "integer"}),
    several(record(k=TEXT, v=WHOLE), 2),
    TEXT,
    WHOLE,
    FLAG,
    record(a=TEXT, b=TEXT, c=TEXT, d=WHOLE),
    record(date={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}),
    record(long={"type": "string", "pattern": "^[0-9]{40}$"}),
    record(emoji={"enum": ["👋", "☀️"]}, 注=TEXT),
    record(when={"type": "string", "format": "date-time"}),
    {"type": "object", "properties": {"a": WHOLE}, "additionalProperties": False},
]


@pytest.fixture(scope="module")
def compile(tiny):
    tokenizer, model = tiny
    return json_grammars(tokenizer, model.config.vocab_size)


def test_every_answer_is_json_of_its_schema(tiny, compile):
    """At a temperature that would write nonsense, in one batch, through the text that a client gets."""
    tokenizer, model = tiny
    batch, works = Batch(model, slots=16), []
    for seed in range(2):
        for index, schema in enumerate(SCHEMAS):
            sampling = Sampling(temperature=1.5, top_k=0, top_p=1.0, seed=100 * seed + index)
            ids = tokenizer.build_chat_input_ids("你好")
            works.append((schema, Generation(ids, [].append, 400, sampling, compile(schema)())))
    batch.add([work for _, work in works])
    while batch.step():
        pass
    for schema, work in works:
        text = tokenizer.decode(work.answer)
        assert work.answer[-1] == tokenizer.eos_token_id, text
        jsonschema.validate(json.loads(text), schema)


HOSTILE = {
    "recursion": {"$ref": "#"},
    "no such type": {"type": "nonsense"},
    "of another machine": {"$ref": "http://127.0.0.1:9/x.json"},
    "what the library does not know": {"if": {"type": "string"}, "then": {"minLength": 3}},
    "nothing may follow": {"enum": []},
    "many keys": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
    "many patterns": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(12)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_that_cannot_be_followed_is_refused(compile, name):
    import torch

    with pytest.raises(GrammarError) as refused:
        compile(HOSTILE[name])().mask(torch.zeros(1952))
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_a_schema_of_many_levels_is_refused(compile):
    schema = {"type": "integer"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError, match="levels"):
        compile(schema)


def test_costly_schemas_are_begun_at_once(compile):
    """One that is unrolled, or followed to its end, would take hours or the machine's memory."""
    import torch

    for pattern in ("^(a+)+$", "(.*a){50}", "(a|b|ab|ba){1,5000}c"):
        assert compile({"type": "string", "pattern": pattern})().mask(torch.zeros(1952)).isfinite().any()
    for schema in ({"type": "string", "maxLength": 10**6}, {"type": "array", "items": WHOLE, "minItems": 10**5}):
        assert compile(schema)().mask(torch.zeros(1952)).isfinite().any()


def test_a_schema_cannot_loosen_the_form(tiny, compile):
    """llguidance reads options of its own out of a schema; ours win."""
    tokenizer, model = tiny
    schema = {**record(a=WHOLE), "x-guidance": {"item_separator": " ; ", "key_separator": "=>", "lenient": True}}
    work = Generation(
        tokenizer.build_chat_input_ids("你好"), [].append, 100, Sampling(temperature=0), compile(schema)()
    )
    batch = Batch(model)
    batch.add([work])
    while batch.step():
        pass
    assert set(json.loads(tokenizer.decode(work.answer))) == {"a"}
