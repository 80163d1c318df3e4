"""Which rounds of a long conversation a prompt holds."""

from __future__ import annotations

import pytest

from serving.rounds import ANSWER_ROOM, latest_rounds


class Tokenizer:
    """A token for each character, and one for each prompt; counts the prompts."""

    def __init__(self):
        self.encoded = 0

    def build_chat_input_ids(self, query, history):
        self.encoded += 1
        return [0] * (1 + len(query) + sum(len(message["content"]) for message in history))


def messages(*contents: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(contents), contents)]


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_the_oldest_rounds_go_first_and_the_system_message_stays(system):
    history = [*system, *messages("a" * 30, "b" * 30, "c" * 20, "d" * 20, "e" * 5, "f" * 5)]
    first = len(system)
    for limit, dropped in ((1000, 0), (300, 0), (200, 1), (90, 2), (20, 3)):
        kept = latest_rounds(Tokenizer(), "q", history, limit)
        assert kept == [*history[:first], *history[first + 2 * dropped :]], limit


def test_no_more_rounds_go_than_must_and_few_prompts_are_encoded():
    history = messages(*(letter * (n % 7) for n in range(2000) for letter in ("问", "答")))
    tokenizer = Tokenizer()
    kept = latest_rounds(tokenizer, "你好", history, 700)
    assert tokenizer.encoded <= 1 + 11  # halvings of 2,000
    length = len(tokenizer.build_chat_input_ids("你好", kept))
    longer = len(tokenizer.build_chat_input_ids("你好", history[-len(kept) - 2 :]))
    assert kept == history[-len(kept) :] and length + ANSWER_ROOM <= 700 < longer + ANSWER_ROOM


def test_a_conversation_that_begins_is_not_looked_at():
    assert latest_rounds(None, "q" * 5000, [], 2048) == []
    assert latest_rounds(None, "q" * 5000, [SYSTEM], 2048) == [SYSTEM]
