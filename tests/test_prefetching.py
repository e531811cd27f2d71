"""Reading ahead gives what reading in turn gives, in that order, and no more of it than is wanted."""

import threading
import time

import pytest

from varkern.prefetching import prefetch


def wait_until(true) -> bool:
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.001)
    return true()


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("ahead", [0, 1, 5, 100])
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_results_in_order(workers, ahead, count):
    def read(item):
        time.sleep(0.0005 * (item * 7 % 4))  # so that later ones are ready sooner
        return item * item

    assert list(prefetch(read, iter(range(count)), workers, ahead)) == [item * item for item in range(count)]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_how_far_ahead(ahead):
    """While the caller has item n, items up to n + ahead are read, and none beyond."""
    begun = []
    results = prefetch(lambda item: begun.append(item) or item, range(50), 3, ahead)
    assert begun == []
    for item in range(10):
        assert next(results) == item
        assert wait_until(lambda item=item: len(begun) == item + 1 + ahead)
    time.sleep(0.01)
    assert sorted(begun) == list(range(10 + ahead))


def test_reads_at_once():
    """Three reads that wait for one another come to an end only if they run at the same time."""
    barrier = threading.Barrier(3, timeout=20)
    assert list(prefetch(lambda item: barrier.wait() >= 0, range(3), 3, 2)) == [True] * 3


def test_an_error_comes_at_its_place_and_as_it_is():
    error = FileNotFoundError(2, "No such file", "image.png")

    def read(item):
        if item == 2:
            raise error
        return item

    results = prefetch(read, range(9), 2, 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(FileNotFoundError) as caught:
        next(results)
    assert caught.value is error and caught.value.filename == "image.png"


@pytest.mark.parametrize("end", ["closed", "error", "done"])
def test_no_thread_is_left(end):
    before = set(threading.enumerate())
    results = prefetch(lambda item: item if item < 20 else 1 // 0, range(20 if end == "done" else 40), 4, 8)
    next(results)
    if end == "closed":
        results.close()
    elif end == "done":
        assert len(list(results)) == 19
    else:
        with pytest.raises(ZeroDivisionError):
            list(results)
    assert wait_until(lambda: set(threading.enumerate()) <= before)


def test_what_is_not_begun_at_the_end_is_not_read():
    begun, go_on, before = [], threading.Event(), set(threading.enumerate())
    results = prefetch(lambda item: begun.append(item) or item == 0 or go_on.wait(20), range(30), 1, 20)
    next(results)
    assert wait_until(lambda: len(begun) == 2)
    results.close()
    go_on.set()
    assert wait_until(lambda: set(threading.enumerate()) <= before) and begun == [0, 1]
