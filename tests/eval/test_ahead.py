"""Tests that prompts are made while others are answered, in order, and that errors arrive."""

import threading
from functools import partial

import pytest

from lctrain.eval import ahead
from lctrain.eval.ahead import MOST_THREADS, called_ahead, called_aside, made_ahead


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


def test_functions_are_called_together_and_their_results_keep_their_order():
    both = threading.Barrier(2)

    def meet(number):
        both.wait(60)  # raises if the other one is not called meanwhile
        return number

    functions = [partial(meet, number) for number in range(6)]
    assert list(called_ahead(functions, 4, threads=2)) == [*range(6)]
    assert list(called_ahead([], 1)) == []


def test_an_error_of_a_function_is_raised_in_its_place_and_ends_the_calls():
    called = []

    def call(number):
        called.append(number)
        if number == 1:
            raise ValueError("lengths must be at least 9")
        return number

    found = called_ahead([partial(call, number) for number in range(50)], 3, threads=1)
    assert next(found) == 0
    with pytest.raises(ValueError, match="lengths must be at least 9"):
        next(found)
    assert len(called) <= 1 + 1 + 3


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (5, 4), (64, MOST_THREADS)])
def test_threads_leave_a_core_of_those_that_the_process_may_use(cores, threads, monkeypatch):
    sizes = []
    pool = ahead.ThreadPoolExecutor

    def counted(size, **settings):
        sizes.append(size)
        return pool(size, **settings)

    monkeypatch.setattr(ahead, "ThreadPoolExecutor", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 512)  # of the machine, which others use too
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {*range(cores)}, raising=False)
    assert list(called_ahead([lambda: 7], 1)) == [7]
    assert sizes == [threads]


def test_calls_end_when_their_consumer_stops():
    called = []
    found = called_ahead([partial(called.append, number) for number in range(50)], 3, threads=1)
    next(found)
    found.close()
    known = len(called)
    assert known <= 1 + 3
    assert not [one for one in threading.enumerate() if one.name.startswith("called_ahead")]


def test_functions_are_called_aside_until_that_is_ended(monkeypatch):
    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)  # one thread
    begun, go_on, called = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        go_on.wait(60)
        called.append("first")

    def fails():
        raise ValueError("dropped")

    end = called_aside([fails, first, partial(called.append, "second")])
    assert begun.wait(60)
    timer = threading.Timer(0.1, go_on.set)
    timer.start()
    end()  # waits for the first, and drops the second
    assert called == ["first"]
    end()
