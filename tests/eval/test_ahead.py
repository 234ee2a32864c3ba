"""Tests that prompts are made while others are answered, in order, and that errors arrive."""

import threading

import pytest

from lctrain.eval.ahead import made_ahead


def test_items_keep_their_order_and_are_made_in_another_thread():
    threads = set()

    def source():
        for number in range(20):
            threads.add(threading.current_thread())
            yield number

    assert list(made_ahead(source(), 3)) == [*range(20)]
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert list(made_ahead([], 3)) == []


def test_the_next_item_is_made_before_it_is_asked_for():
    made = threading.Event()

    def source():
        yield 1
        made.set()
        yield 2

    found = made_ahead(source(), 2)
    assert next(found) == 1
    assert made.wait(60)
    assert list(found) == [2]


def test_no_more_items_are_made_than_allowed():
    made = []

    def source():
        for number in range(20):
            made.append(number)
            yield number

    found = made_ahead(source(), 2)
    assert next(found) == 0
    found.close()  # waits for the thread
    assert len(made) <= 1 + 2
    assert next(found, None) is None


def test_an_error_is_raised_in_the_place_of_its_item():
    def source():
        yield 1
        raise ValueError("lengths must be at least 9")

    found = made_ahead(source(), 5)
    assert next(found) == 1
    with pytest.raises(ValueError, match="lengths must be at least 9"):
        next(found)
