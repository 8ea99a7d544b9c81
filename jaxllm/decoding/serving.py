"""Continuous batching: rows come and go while others are decoded.

A server has a fixed number of places and a pool of pages. Between two dispatches of the
jitted loop the host gives free places to waiting rows, gives pages to rows that grow,
and hands out rows that are done. Prompts that begin like earlier ones read their pages.

A row's tokens depend on its prompt, seed and options alone, so a row may be put back
and computed again where pages run out: it goes on with the same tokens.

Letters: B places, R rows that come together, S slots of a row, N pages of a row.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.attention.paged import PagedCache, copy_pages
from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.core.sharding import fetch
from jaxllm.decoding.buckets import CHUNK, batch_bucket, prompt_bucket
from jaxllm.decoding.decode import Output, Request, check, raise_nonfinite, row_stats
from jaxllm.decoding.engine import DecodeState, advance, prefill
from jaxllm.decoding.pages import Found, PagePool
from jaxllm.decoding.places import add_stats, put_rows, row_axes
from jaxllm.decoding.protocol import Committed, Drafter, Params
from jaxllm.decoding.sampling import Sampler
from jaxllm.decoding.service import NOBODY, Arrival, Row, Service, join_sampling
from jaxllm.decoding.verify import check_verifier
from jaxllm.models.freeze import Model

__all__ = ["Arrival", "Server", "Service", "serve"]


class Server:
    """Places, pages and the rows in them; an object that changes.

    Attributes:
      pool: Who owns which page.
      waiting: Rows without a place, in order.
      places: Row of each place, or None.
      preemptions: How often a row was put back for want of pages.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        drafter: Drafter,
        service: Service | None = None,
        eos: tuple[int, ...] = (),
        cache_dtype: Any = None,
    ):
        """Makes an empty server; arguments as for `decode_chunks`."""
        if drafter.prompt_hidden:
            raise ConfigError(
                f"cannot serve: {type(drafter).__name__} reads the hidden states of "
                f"whole prompts, expected a drafter that does not. Choose another."
            )
        self.model, self.params, self.drafter = model, params, drafter
        self.service = service = Service() if service is None else service
        self.pool = PagePool(service.pool, service.page_slots)
        self.waiting: collections.deque[Row] = collections.deque()
        self.places: list[Row | None] = [None] * service.rows
        self.preemptions = 0
        self._eos = eos
        self._submitted = 0
        self._options: dict[str, Any] = {"model": model, "drafter": drafter}
        original = model.config.rope_original_length
        long = original is not None and service.capacity > original
        self._options["rope_length"] = service.capacity if long else (original or 1)
        cache = _pages(
            params["target"], model=model, service=service, dtype=cache_dtype
        )
        self._state = self._start([NOBODY] * service.rows, cache, chunk=1)
        self._axes = row_axes(self._shapes(2), self._shapes(3))

    @property
    def _cache(self) -> PagedCache:
        return cast(PagedCache, self._state.cache)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not any(self.places)

    def submit(self, arrival: Arrival) -> int:
        """Adds a row to those that wait; returns its number.

        Raises:
          UserError: It is wrong, or could never fit.
        """
        sampler = join_sampling([arrival], self.service.verify)
        check_verifier(self.drafter, sampler)
        request = Request(
            prompts=[arrival.prompt],
            max_new_tokens=[arrival.max_new_tokens],
            sampler=sampler,
            seeds=[arrival.seed],
        )
        check(self.model, request)
        row = Row(self._submitted, arrival, list(arrival.prompt))
        service, needed = self.service, row.limit + self.drafter.depth
        held = min(service.capacity, service.pool * service.page_slots)
        if needed > held:
            raise CapacityError(
                f"cannot serve: row {row.index} needs {needed} slots (prompt, new "
                f"tokens, a draft's depth), expected at most {held} (capacity "
                f"{service.capacity}, {service.pool} pages of {service.page_slots}). "
                f"Shorten it, or serve with more."
            )
        self._submitted += 1
        self.waiting.append(row)
        return row.index

    def step(self) -> list[tuple[int, Output]]:
        """Lets rows in, runs some steps, and returns the rows that are done."""
        self._admit()
        if not any(self.places):
            return self._collect()
        steps = self._make_room()
        sampler = self._place()
        self._state = advance(
            self.params,
            self._state,
            sampler,
            jnp.asarray(self._eos or (-1,), jnp.int32),
            jnp.int32(steps),
            **self._options,
        )
        if not fetch(self._state.finite_B).all():
            raise_nonfinite(self.model, self.params["target"], self._state)
        return self._collect()

    def learned(self) -> Any:
        """Returns the drafter's parameters with what it has learned so far."""
        return self.drafter.learned(self.params["drafter"], self._state.drafter)

    # --- Rows come --------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free places to waiting rows, in order, while there are pages."""
        while self.waiting and None in self.places:
            rows: list[tuple[Row, Found]] = []
            while self.waiting and self.places.count(None) > len(rows):
                row = self.waiting[0]
                found = self.pool.find(row.tokens[: max(len(row.tokens) - 2, 0)])
                if rows and not self._alike(rows[0][0], row):
                    break
                if not self._take_pages(row, found):
                    break
                rows.append((self.waiting.popleft(), found))
            if not rows:
                return
            self._let_in(rows)

    def _alike(self, first: Row, row: Row) -> bool:
        """Whether two rows come together: one bucket, and nothing to share.

        What a row computes is there for others once it has come; so a row that begins
        like another waits for the next turn.
        """
        same = prompt_bucket(len(first.tokens)) == prompt_bucket(len(row.tokens))
        return same and first.tokens[0] != row.tokens[0]

    def _take_pages(self, row: Row, found: Found) -> bool:
        """Gives a row the pages of its prompt; False where there are too few."""
        kept = [*found.pages, *([] if found.partial is None else [found.partial])]
        self.pool.share(kept)
        needed = -(-len(row.tokens) // self.service.page_slots) - len(found.pages)
        # Rows that are here already may each want one more page soon.
        spare = sum(place is not None for place in self.places)
        fresh = None
        if self.pool.free >= needed + spare:
            fresh = self.pool.take(needed)
        if fresh is None:
            self.pool.release(kept)
            return False
        row.pages = [*found.pages, *fresh]
        return True

    def _let_in(self, arrivals: list[tuple[Row, Found]]) -> None:
        """Runs the prompts of some rows and puts them into free places."""
        rows, slots = [row for row, _ in arrivals], self.service.page_slots
        free = [i for i, row in enumerate(self.places) if row is None]
        known = [len(found.pages) * slots + found.count for _, found in arrivals]
        cache = self._copied(arrivals)
        fresh = max(len(row.tokens) - n for row, n in zip(rows, known, strict=True))
        count = batch_bucket(len(rows))
        fill = count - len(rows)
        padded = [*rows, *[NOBODY] * fill]
        table_RN, writable_R = self._tables(padded)
        length_R = np.asarray([*known, *[0] * fill], np.int32)
        cache = dataclasses.replace(
            cache,
            table_BN=jnp.asarray(table_RN),
            writable_B=jnp.asarray(writable_R),
            length_B=jnp.asarray(length_R),
        )
        new = self._start(padded, cache, chunk=min(prompt_bucket(fresh), CHUNK))
        places = free[: len(rows)]
        at_R = np.asarray([*places, *[self.service.rows] * fill], np.int32)
        self._insert(new, jnp.asarray(at_R))
        for place, row in zip(places, rows, strict=True):
            self.places[place] = row
            self.pool.remember(row.tokens[:-1], row.pages)
        for _, found in arrivals:
            if found.partial is not None:
                self.pool.release([found.partial])

    def _copied(self, arrivals: list[tuple[Row, Found]]) -> PagedCache:
        """Returns the cache with the pages copied that rows will write behind."""
        pairs = [
            (found.partial, row.pages[len(found.pages)])
            for row, found in arrivals
            if found.partial is not None
        ]
        if not pairs:
            return self._cache
        fill = batch_bucket(len(pairs)) - len(pairs)
        pairs += [(0, self.service.pool)] * fill
        source_C, target_C = jnp.asarray(pairs, jnp.int32).T
        return _copy_pages(self._cache, source_C, target_C)

    def _start(self, rows: list[Row], cache: PagedCache, chunk: int) -> DecodeState:
        """Runs the prompts of some rows, from where their pages end."""
        S = self.service.capacity
        tokens_RS = np.zeros((len(rows), S), np.int32)
        for i, row in enumerate(rows):
            tokens_RS[i, : len(row.tokens)] = row.tokens
        length_R = np.asarray([len(row.tokens) for row in rows], np.int32)
        prompt_R = np.asarray([len(row.arrival.prompt) for row in rows], np.int32)
        limit_R = np.asarray([row.limit for row in rows], np.int32)
        seeds = np.asarray([row.arrival.seed for row in rows], np.uint32)
        committed = Committed(
            jnp.asarray(tokens_RS),
            jnp.asarray(length_R),
            row_keys(seeds),
            self._sampler(rows),
            jnp.asarray(prompt_R),
        )
        return prefill(
            self.params,
            committed,
            cache,
            jnp.asarray(limit_R),
            jnp.zeros((len(rows),), bool),
            chunk=chunk,
            **self._options,
        )

    def _insert(self, new: DecodeState, at_R: Array) -> None:
        """Puts new rows into their places; the pool is the new state's."""
        old, fresh = _rows_of(self._state), _rows_of(new)
        merged = put_rows(old, fresh, at_R, axes=self._axes)
        self._state = dataclasses.replace(merged, cache=new.cache)

    def _shapes(self, count: int) -> DecodeState:
        """Returns the shapes of a state of so many rows, without its pool."""
        cache = jax.eval_shape(functools.partial(_resized, rows=count), self._cache)
        start = functools.partial(self._start, [NOBODY] * count, chunk=1)
        return _rows_of(jax.eval_shape(start, cache))

    # --- Rows grow --------------------------------------------------------------

    def _make_room(self) -> int:
        """Gives pages for the next steps; puts the youngest rows back if it has to.

        Returns:
          How many steps there is room for.
        """
        while True:
            rows = sorted(filter(None, self.places), key=lambda row: row.index)
            for steps in sorted({self.service.steps, 4, 1}, reverse=True):
                wanted = [self._pages_wanted(row, steps) for row in rows]
                if steps <= self.service.steps and sum(wanted) <= self.pool.free:
                    for row, count in zip(rows, wanted, strict=True):
                        row.pages += self.pool.take(count) or []
                    return steps
            self._put_back(rows[-1])

    def _pages_wanted(self, row: Row, steps: int) -> int:
        """Returns the pages that a row lacks for some steps, whatever is accepted."""
        tokens = len(row.tokens) + steps * (self.drafter.depth + 1)
        pages = -(-min(tokens, row.limit) // self.service.page_slots)
        return max(0, pages - len(row.pages))

    def _put_back(self, row: Row) -> None:
        """Takes a row's place and pages; it is the next to come again."""
        place = self.places.index(row)
        row.stats = add_stats(row.stats, row_stats(fetch(self._state.stats), place))
        self._leave(place)
        self.waiting.appendleft(row)
        self.preemptions += 1

    def _leave(self, place: int) -> None:
        row = self.places[place]
        assert row is not None
        self.pool.remember(row.tokens[:-1], row.pages)
        self.pool.release(row.pages)
        row.pages, self.places[place] = [], None

    def _place(self) -> Sampler:
        """Tells the device who owns what and who is there; returns who chooses how."""
        rows = [NOBODY if row is None else row for row in self.places]
        table_BN, writable_B = self._tables(rows)
        length_B = np.asarray([len(row.tokens) - 1 for row in rows], np.int32)
        state = self._state
        sampler = self._sampler(rows)
        absent_B = jnp.asarray([row is None for row in self.places])
        # The loop takes its state's arrays, so these are others.
        chosen = jax.tree.map(jnp.copy, sampler)
        self._state = dataclasses.replace(
            state,
            committed=dataclasses.replace(state.committed, sampler=chosen),
            cache=dataclasses.replace(
                self._cache,
                table_BN=jnp.asarray(table_BN),
                length_B=jnp.asarray(length_B),
                writable_B=jnp.asarray(writable_B),
            ),
            done_B=state.done_B | absent_B,
        )
        return sampler

    def _tables(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        table_BN = np.zeros((len(rows), self.service.row_pages), np.int32)
        for i, row in enumerate(rows):
            table_BN[i, : len(row.pages)] = row.pages
        slots = self.service.page_slots
        return table_BN, np.asarray([len(r.pages) * slots for r in rows], np.int32)

    def _sampler(self, rows: list[Row]) -> Sampler:
        return join_sampling([row.arrival for row in rows], self.service.verify)

    # --- Rows go ----------------------------------------------------------------

    def _collect(self) -> list[tuple[int, Output]]:
        """Reads what was emitted; rows that are done leave."""
        state = self._state
        tokens_BS, length_B, done_B, logprob_BS, stats = fetch(
            (
                state.committed.tokens_BS,
                state.committed.length_B,
                state.done_B,
                state.logprob_BS,
                state.stats,
            )
        )
        finished = []
        for place, row in enumerate(self.places):
            if row is None:
                continue
            fresh = slice(len(row.tokens), int(length_B[place]))
            row.tokens += tokens_BS[place, fresh].tolist()
            row.logprobs += logprob_BS[place, fresh].tolist()
            if done_B[place]:
                row.stats = add_stats(row.stats, row_stats(stats, place))
                self._leave(place)
                finished.append((row.index, self._output(row)))
        return finished

    def _output(self, row: Row) -> Output:
        ids = row.tokens[len(row.arrival.prompt) :]
        return Output(ids, row.logprobs, bool(ids) and ids[-1] in self._eos, row.stats)


def serve(
    model: Model, params: Params, arrivals: Iterable[Arrival], **options: Any
) -> Iterator[tuple[int, Output]]:
    """Decodes rows as they come, and hands them out as they are done.

    Args:
      model: The target.
      params: `{"target", "drafter"}`.
      arrivals: Rows; read as far as places are free, so it may be endless.
      **options: As for `Server`.

    Yields:
      The number of a row in `arrivals`, and its output.
    """
    server, source = Server(model, params, **options), iter(arrivals)
    more = True
    while more or not server.idle:
        while more and len(server.waiting) < server.service.rows:
            arrival = next(source, None)
            more = arrival is not None
            if arrival is not None:
                server.submit(arrival)
        yield from server.step()


def _rows_of(state: DecodeState) -> DecodeState:
    """Returns the state without its pool, and without options that are static."""
    committed, none = dataclasses.replace(state.committed, sampler=None), cast(Any, ())
    return dataclasses.replace(state, committed=committed, cache=none)


def _resized(cache: PagedCache, rows: int) -> PagedCache:
    def resize(x: Array) -> Array:
        return jnp.zeros((rows, *x.shape[1:]), x.dtype)

    return dataclasses.replace(
        cache,
        table_BN=resize(cache.table_BN),
        length_B=resize(cache.length_B),
        writable_B=resize(cache.writable_B),
    )


_copy_pages = jax.jit(copy_pages, donate_argnames=("cache",))


@functools.partial(jax.jit, static_argnames=("model", "service", "dtype"))
def _pages(params: Any, *, model: Model, service: Service, dtype: Any) -> PagedCache:
    """Makes the pool on the devices where it will live."""
    return model.init_pages(
        params,
        service.rows,
        pages=service.pool,
        page_slots=service.page_slots,
        row_pages=service.row_pages,
        dtype=dtype,
    )
