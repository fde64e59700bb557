from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tkit.runtime.scheduler import Generation, QueueFull, RowMove, Scheduler, round_up


def make(*, rows: int = 4, queue: int = 100, budget: int = 10_000) -> Scheduler[Generation]:
    return Scheduler(max_batch_size=rows, max_queue_size=queue, kv_budget_tokens=budget)


def request(prompt: int = 10, max_tokens: int = 10) -> Generation:
    return Generation(prompt_ids=[0] * prompt, max_tokens=max_tokens)


def read_prompt(scheduler: Scheduler[Generation], max_tokens: int = 10_000) -> Generation | None:
    prefill = scheduler.next_prefill(max_tokens)
    if prefill is None:
        return None
    prefill.generation.num_cached = prefill.end
    return prefill.generation


def test_requests_run_in_the_order_they_came_as_rows_become_free() -> None:
    scheduler = make(rows=2)
    first, second, third = requests = [request() for _ in range(3)]
    for each in requests:
        scheduler.add(each)
    assert [read_prompt(scheduler) for _ in range(3)] == [first, second, None]
    assert scheduler.decoding() == [first, second]
    scheduler.remove(first)
    assert read_prompt(scheduler) is third
    assert scheduler.decoding() == [second, third]


def test_a_long_prompt_is_read_in_pieces_and_its_request_decodes_only_then() -> None:
    scheduler = make()
    scheduler.add(long := request(prompt=25))
    scheduler.add(other := request(prompt=3))
    pieces = []
    for _ in range(3):
        piece = scheduler.next_prefill(10)
        assert piece is not None and piece.generation is long
        assert scheduler.decoding() == []
        pieces.append((piece.row, piece.start, piece.end))
        long.num_cached = piece.end
    assert pieces == [(0, 0, 10), (0, 10, 20), (0, 20, 25)]
    assert scheduler.decoding() == [long]
    assert read_prompt(scheduler, 10) is other


def test_the_gap_is_filled_from_the_end_and_the_row_that_prefills_stays_last() -> None:
    scheduler = make()
    requests = [request() for _ in range(3)]
    for each in (*requests, unread := request(prompt=30)):
        scheduler.add(each)
    for _ in requests:
        read_prompt(scheduler)
    requests[2].num_cached = 12
    unread.num_cached = 0
    assert (piece := scheduler.next_prefill(20)) is not None
    unread.num_cached = piece.end
    moves = scheduler.remove(requests[0])
    assert moves == [RowMove(source=2, target=0, length=12), RowMove(source=3, target=2, length=20)]
    assert scheduler.running == [requests[2], requests[1], unread]
    assert scheduler.remove(unread) == []
    assert scheduler.remove(requests[1]) == []


def test_what_counts_is_the_rectangle_of_rows_and_the_longest_row() -> None:
    scheduler = make(budget=4 * 128)
    scheduler.add(request(prompt=100, max_tokens=28))  # 128
    scheduler.add(request(prompt=100, max_tokens=29))  # 129: two rows of 256
    scheduler.add(short := request(prompt=1, max_tokens=1))
    assert read_prompt(scheduler) and read_prompt(scheduler)
    assert read_prompt(scheduler) is None, "three rows of 256 exceed 512"
    scheduler.remove(scheduler.running[1])
    assert read_prompt(scheduler) is short


def test_the_first_in_line_is_not_overtaken_by_one_that_would_fit() -> None:
    scheduler = make(budget=512)
    for each in (request(), long := request(prompt=500, max_tokens=12), small := request()):
        scheduler.add(each)
    assert read_prompt(scheduler) is not None
    assert read_prompt(scheduler) is None
    scheduler.remove(scheduler.running[0])
    assert read_prompt(scheduler) is long
    assert read_prompt(scheduler) is None
    scheduler.remove(long)
    assert read_prompt(scheduler) is small


def test_a_full_queue_refuses_and_says_how_full() -> None:
    scheduler = make(rows=1, queue=2)
    scheduler.add(request())
    read_prompt(scheduler)
    scheduler.add(request())
    scheduler.add(waiting := request())
    with pytest.raises(QueueFull, match="queue full: 2 requests wait and 1 run; it holds 2"):
        scheduler.add(request())
    scheduler.remove(waiting)
    scheduler.add(request())


@pytest.mark.parametrize(("length", "fits"), [(512, True), (513, False)])
def test_a_request_longer_than_the_cache_never_fits(length: int, fits: bool) -> None:
    assert make(budget=512).fits_alone(length) is fits


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(0, 30)), max_size=30))
def test_whatever_comes_rows_hold_their_own_tokens_within_the_budget(requests: list[tuple[int, int, int]]) -> None:
    """Plays the engine: writes each request's mark into its row, follows the moves, ends requests at random."""
    budget, scheduler = 1024, make(rows=5, budget=1024)
    rows: list[list[Generation | None]] = [[None] * 1024 for _ in range(5)]
    todo = [request(prompt, max_tokens) for prompt, max_tokens, _ in requests]
    lifetimes = {id(each): lifetime for each, (_, _, lifetime) in zip(todo, requests, strict=True)}
    for each in todo:
        scheduler.add(each)
    finished = []
    for _ in range(20_000):
        if prefill := scheduler.next_prefill(64):
            rows[prefill.row][prefill.start : prefill.end] = [prefill.generation] * (prefill.end - prefill.start)
            prefill.generation.num_cached = prefill.end
        batch = scheduler.decoding()
        assert batch == scheduler.running[: len(batch)], "rows that decode lie at the front"
        for row, each in enumerate(batch):
            rows[row][each.num_cached] = each
            each.num_cached += 1
        running = scheduler.running
        longest = max((each.max_length for each in running), default=0)
        assert len(running) * round_up(longest) <= budget
        for row, each in enumerate(running):
            assert rows[row][: each.num_cached] == [each] * each.num_cached
        for each in list(running):
            lifetimes[id(each)] -= 1
            if lifetimes[id(each)] < 0 or each.num_cached == each.max_length - 1:
                finished.append(each)
                for move in scheduler.remove(each):
                    rows[move.target][: move.length] = rows[move.source][: move.length]
        if not scheduler.running and not scheduler.waiting:
            break
    assert len(finished) == len(todo), "a request was never served"
