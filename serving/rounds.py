"""The rounds of a long conversation that leave room for an answer, or for what is tuned on."""

from __future__ import annotations

ANSWER_ROOM = 256  # tokens; a long conversation loses its oldest rounds before it loses these


def starts_of_rounds(history: list) -> list[int]:
    """Where the rounds of a history begin: of (query, answer) pairs, or of messages."""
    return [n for n, turn in enumerate(history) if not isinstance(turn, dict) or turn.get("role") == "user"]


def without_oldest_rounds(history: list, count: int) -> list:
    """`history` without its first `count` questions and their answers; a system message stays."""
    starts = starts_of_rounds(history)
    return [*history[: starts[0]], *history[[*starts, len(history)][count] :]] if count else history


def latest_rounds(tokenizer, query: str, history: list, max_length: int) -> list:
    """`history` without as many of the oldest rounds as it takes to keep ANSWER_ROOM tokens of `max_length` free, or
    half of it where that is less."""
    room = min(ANSWER_ROOM, max_length // 2)

    def fits(count: int) -> bool:
        ids = tokenizer.build_chat_input_ids(query, without_oldest_rounds(history, count))
        return len(ids) + room <= max_length

    too_few, enough = -1, len(starts_of_rounds(history))
    if enough and fits(0):
        return history
    while enough - too_few > 1:  # by bisection: encoding a long history takes its time
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return without_oldest_rounds(history, enough)
