"""The rounds of a long conversation that leave room for an answer."""

from __future__ import annotations

ANSWER_ROOM = 256  # tokens; a long conversation loses its oldest rounds before it loses these


def latest_rounds(tokenizer, query: str, messages: list[dict], max_length: int) -> list[dict]:
    """`messages` without as many of the oldest rounds as it takes to keep ANSWER_ROOM tokens of `max_length` free, or
    half of it where that is less. A system message stays."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    room, places = min(ANSWER_ROOM, max_length // 2), [*starts, len(messages)]

    def without(rounds: int) -> list[dict]:
        return [*messages[: places[0]], *messages[places[rounds] :]]

    def fits(rounds: int) -> bool:
        return len(tokenizer.build_chat_input_ids(query, without(rounds))) + room <= max_length

    too_few, enough = -1, len(starts)
    if enough and fits(0):
        return messages
    while enough - too_few > 1:  # by bisection: encoding a long history takes its time
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return without(enough)
