"""A jsonl file of conversations -> the sequences that ChatGLM is tuned on.

A row is one of
* the official columns: {"prompt": "...", "response": "...", "history": [["question", "answer"], ...]}, or without the
  last;
* messages: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}, of which
  every answer becomes an example, with what was said before it;
* a dialogue as in tiny/dialogues.jsonl: {"rounds": [{"ask": ["phrasing", ...], "answer": "..."}, ...]}.

The sequence is the official one: prompt, [gMASK], <sop>, answer, <eop>, where the prompt of several rounds is the text
of `tokenizer.build_prompt`; labels from <sop> on. Control tokens in what people typed are spelled out, not obeyed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from serving.rounds import starts_of_rounds, without_oldest_rounds

IGNORED = -100  # label of a token without loss
SHOWN = 10  # bad rows that are named


class Exchange(NamedTuple):
    """One question, what was said before it, and its answer; None where the file has none."""

    query: str
    history: list
    answer: str | None
    line: int


class Columns(NamedTuple):
    prompt: str = "prompt"
    response: str = "response"
    history: str = "history"


class Sizes(NamedTuple):
    """Most tokens of a prompt with [gMASK], and of an answer with <sop> and <eop>."""

    source: int = 512
    target: int = 512


COLUMNS, SIZES = Columns(), Sizes()


class Example(NamedTuple):
    ids: list[int]
    labels: list[int]
    lost: str  # what did not fit: "", "rounds", "query" or "answer"


def read_exchanges(
    path: Path, tokenizer, columns: Columns = COLUMNS, need_answers: bool = True, skip_bad: bool = False
) -> list[Exchange]:
    """All exchanges of a file, in its order.

    Raises:
        ValueError: rows that cannot be used, by line; without `skip_bad`, or where no row can.
    """
    found: list[Exchange] = []
    bad: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            of_row = list(exchanges_of(row, columns, number))
            for exchange in of_row:
                check(exchange, tokenizer, need_answers)
            found += of_row
        except ValueError as error:  # JSON and UTF-8 errors are some, too
            bad.append(f"  line {number}: {error}")
    if bad and not (skip_bad and found):
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = "\n".join(bad[:SHOWN])
        raise ValueError(f"{path}: {len(bad)} rows cannot be used (--skip-bad leaves them out):\n{listed}{more}")
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found


def exchanges_of(row: Any, columns: Columns, line: int) -> Iterator[Exchange]:
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object with columns")
    if "messages" in row:
        yield from of_messages(row["messages"], line)
    elif "rounds" in row:
        yield from of_dialogue(row["rounds"], line)
    elif columns.prompt in row:
        yield Exchange(row[columns.prompt], row.get(columns.history) or [], row.get(columns.response), line)
    else:
        raise ValueError(f"no column {columns.prompt!r} among {sorted(row)} (--prompt-column names another)")


def of_messages(messages: Any, line: int) -> Iterator[Exchange]:
    """One for each answer; for a last question without one, an exchange without."""
    is_list = isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages)
    if not is_list or not any(one["role"] == "user" for one in messages):
        raise ValueError("'messages' is no list of objects with a role and content, one of them of a user")
    for index, message in enumerate(messages):
        ends = index + 1 == len(messages) or messages[index + 1]["role"] != "assistant"
        if message["role"] == "user":
            answer = None if ends else messages[index + 1].get("content")
            yield Exchange(message.get("content"), messages[:index], answer, line)
        elif message["role"] == "assistant" and (index == 0 or messages[index - 1]["role"] != "user"):
            raise ValueError(f"message {index} is an answer to no question")


def of_dialogue(rounds: Any, line: int) -> Iterator[Exchange]:
    if not isinstance(rounds, list) or not all(
        isinstance(one, dict) and isinstance(one.get("ask"), list) and one["ask"] for one in rounds
    ):
        raise ValueError("'rounds' is no list of objects with 'ask', a list of prompts, and 'answer'")
    for index, one in enumerate(rounds):
        history = [(earlier["ask"][0], earlier.get("answer")) for earlier in rounds[:index]]
        for query in one["ask"]:
            yield Exchange(query, history, one.get("answer"), line)


def check(exchange: Exchange, tokenizer, need_answer: bool) -> None:
    if not isinstance(exchange.query, str) or not exchange.query.strip():
        raise ValueError(f"the prompt is {exchange.query!r}, no text")
    if (need_answer or exchange.answer is not None) and (
        not isinstance(exchange.answer, str) or not exchange.answer.strip()
    ):
        raise ValueError(f"the response is {exchange.answer!r}, no text")
    tokenizer.build_chat_input_ids(exchange.query, exchange.history)
    tokenizer.encode_text(exchange.answer or "")


def encode(exchange: Exchange, tokenizer, sizes: Sizes = SIZES) -> Example:
    """The official sequence. Where the prompt is too long its oldest rounds go first, then the end of the query; of an
    answer that is too long the beginning stays, closed by <eop> as the official code closes it."""
    context, lost = context_of(exchange, tokenizer, sizes.source)
    answer = tokenizer.encode_text(exchange.answer)
    if len(answer) > sizes.target - 2:
        answer, lost = answer[: sizes.target - 2], "answer"
    target = [tokenizer.bos_token_id, *answer, tokenizer.eos_token_id]
    return Example(context + target, [IGNORED] * len(context) + target, lost)


def context_of(exchange: Exchange, tokenizer, most: int) -> tuple[list[int], str]:
    """The prompt's ids with [gMASK], at most `most`; what was left out."""
    for without in range(len(starts_of_rounds(exchange.history)) + 1):
        history = without_oldest_rounds(exchange.history, without)
        ids = tokenizer.build_chat_input_ids(exchange.query, history)[:-1]
        if len(ids) <= most:
            return ids, "rounds" if without else ""
    return [*ids[: most - 1], ids[-1]], "query"


def encode_all(exchanges: list[Exchange], tokenizer, sizes: Sizes, say=print) -> list[Example]:
    """Says how many did not fit."""
    examples = [encode(exchange, tokenizer, sizes) for exchange in exchanges]
    for lost, option in (("rounds", "source"), ("query", "source"), ("answer", "target")):
        lines = [exchange.line for exchange, example in zip(exchanges, examples) if example.lost == lost]
        if lines:
            what = "without their oldest rounds" if lost == "rounds" else f"with the end of the {lost} cut off"
            say(f"{len(lines)} of {len(examples)} examples {what} (--max-{option}), line {lines[0]} for one")
    return examples
