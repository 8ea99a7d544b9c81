"""Pages are never lost, never owned twice by mistake, never written while shared."""

import random

import pytest

from jaxllm.decoding.pages import Found, PagePool

SLOTS = 4


def filled(pool, tokens):
    pages = pool.take(-(-len(tokens) // pool.page_slots))
    pool.remember(tokens, pages)
    return pages


def test_taken_pages_come_back():
    pool = PagePool(5, SLOTS)
    first, second = pool.take(3), pool.take(2)
    assert sorted(first + second) == list(range(5)) and pool.free == 0
    assert pool.take(1) is None
    pool.release(first)
    assert pool.free == 3 and pool.take(4) is None
    assert sorted(pool.take(3)) == sorted(first)


def test_a_page_is_free_when_its_last_reader_is_gone():
    pool = PagePool(3, SLOTS)
    pages = pool.take(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.free == 1 and pool.readers(pages[0]) == 1
    pool.release(pages)
    assert pool.free == 3
    with pytest.raises(ValueError, match="nobody reads it"):
        pool.release(pages[:1])


def test_prompts_find_what_begins_like_them():
    pool = PagePool(8, SLOTS)
    pages = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert pool.find([1, 2, 3, 4, 5, 6, 7, 8]) == Found(pages[:2])
    assert pool.find([1, 2, 3, 4, 5, 6, 7, 8, 9, 11]) == Found(pages[:2], pages[2], 1)
    assert pool.find([1, 2, 3, 4, 5, 6]) == Found(pages[:1], pages[1], 2)
    assert pool.find([1, 2, 9]) == Found([], pages[0], 2)
    assert pool.find([2, 2]) == Found([])
    # The same tokens behind another beginning are another page.
    assert pool.find([9, 9, 9, 9, 5, 6, 7, 8]) == Found([])
    assert pool.find([]) == Found([])


def test_what_a_free_page_holds_is_found_until_it_is_taken():
    pool = PagePool(3, SLOTS)
    pages = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    pool.release(pages)
    assert pool.free == 3
    found = pool.find([1, 2, 3, 4, 5, 6, 7, 8])
    assert found == Found(pages)
    pool.share(found.pages)
    assert pool.free == 1
    pool.release(pages)
    # The end of the row goes first.
    pool.take(2)
    assert pool.find([1, 2, 3, 4, 5, 6, 7, 8]) == Found(pages[:1])
    pool.take(1)
    assert pool.find([1, 2, 3, 4]) == Found([])


def test_a_row_that_grew_is_found_by_its_new_tokens():
    pool = PagePool(4, SLOTS)
    pages = filled(pool, [1, 2])
    pool.remember([1, 2, 3, 4, 5], [*pages, *(more := pool.take(1))])
    assert pool.find([1, 2, 3, 4, 5, 6]) == Found(pages, more[0], 1)


def test_a_long_random_workload_loses_nothing():
    """A hundred thousand rows come, begin like others, grow and go."""
    rng = random.Random(0)
    pool = PagePool(64, SLOTS)
    rows: list[tuple[list[int], list[int]]] = []
    held: dict[int, tuple[int, ...]] = {}  # what was really written to a page
    operations = hits = copies = waits = 0

    def write(tokens, pages, first):
        """Writes tokens from `first` on, as a program would."""
        for at in range(first // SLOTS, -(-len(tokens) // SLOTS)):
            assert pool.readers(pages[at]) == 1, "a shared page is written"
            held[pages[at]] = tuple(tokens[at * SLOTS : (at + 1) * SLOTS])

    while operations < 100_000:
        operations += 1
        action = rng.random()
        if action < 0.4 and len(rows) < 24:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            found = pool.find(tokens[:-1])
            known = len(found.pages) * SLOTS
            for at, page in enumerate(found.pages):
                assert held[page] == tuple(tokens[at * SLOTS : (at + 1) * SLOTS])
            pool.share(found.pages)
            fresh = pool.take(-(-len(tokens) // SLOTS) - len(found.pages))
            if fresh is None:
                pool.release(found.pages)
                waits += 1
                continue
            if found.count:
                # Of a page that may have been taken just now, or is still there.
                part = tuple(tokens[known : known + found.count])
                if found.partial not in fresh:
                    assert held[found.partial][: found.count] == part
                    copies += 1
            hits += bool(found.pages)
            pages = [*found.pages, *fresh]
            write(tokens, pages, known)
            pool.remember(tokens, pages)
            rows.append((tokens, pages))
        elif action < 0.8 and rows:
            tokens, pages = rng.choice(rows)
            more = [rng.randrange(2) for _ in range(rng.randrange(1, 4))]
            needed = -(-(len(tokens) + len(more)) // SLOTS) - len(pages)
            fresh = pool.take(needed)
            if fresh is None:
                waits += 1
                continue
            first = len(tokens)
            tokens += more
            pages += fresh
            # A page that another row has found since is not this row's any more.
            if pool.readers(pages[first // SLOTS]) == 1:
                write(tokens, pages, first)
                pool.remember(tokens, pages)
            else:
                raise AssertionError("a page that is not full has two readers")
        elif rows:
            _, pages = rows.pop(rng.randrange(len(rows)))
            pool.release(pages)
        readers = [0] * pool.pages
        if operations % 500 == 0:
            for _, pages in rows:
                for page in pages:
                    readers[page] += 1
            assert readers == [pool.readers(page) for page in range(pool.pages)]
            assert pool.free == readers.count(0)
    assert min(hits, copies, waits) > 1000
    for _, pages in rows:
        pool.release(pages)
    assert pool.free == 64
