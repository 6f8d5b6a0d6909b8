"""Impressions drawn from the world: who saw what, whether it was clicked, whether it converted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from escm2rec.simulate.population import Floats, Ints
from escm2rec.simulate.world import Rows, World, exposures, generator

CHUNK_ROWS = 50_000  # rows drawn from one stream of random numbers; another value is another log
SLICE_ROWS = 50_000  # rows held as text or columns at a time


@dataclass(frozen=True)
class Impressions:
    """B impressions with their labels and truth. click ~ Bernoulli(p), r ~ Bernoulli(eta) independent of it, conversion = click r."""

    sample_id: Ints
    rows: Rows
    click: NDArray[np.bool_]
    conversion: NDArray[np.bool_]
    propensity: Floats
    cvr: Floats


def shard(world: World, start: int, stop: int) -> Iterator[Impressions]:
    """Impressions start..stop of the log, a slice at a time, those of one user together.

    An impression depends on the world and on its place in the log alone: a longer log begins with the same impressions, and shards of
    another size hold the same ones. `sample_id` is that place, from 1.
    """
    numbers = range(start // CHUNK_ROWS, (stop - 1) // CHUNK_ROWS + 1)
    chunks = [_chunk(world, number, start, stop) for number in numbers]
    columns = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    order = np.argsort(columns[1], kind="stable")
    for low in range(0, len(order), SLICE_ROWS):
        sample_id, user, item, scene, click_at, convert_at = (column[order[low : low + SLICE_ROWS]] for column in columns)
        rows = world.rows(user, item, scene)
        propensity, cvr = world.truth(rows)
        click = click_at < propensity
        yield Impressions(sample_id, rows, click, click & (convert_at < cvr), propensity, cvr)


def _chunk(world: World, number: int, start: int, stop: int) -> tuple[Ints | Floats, ...]:
    """Chunk `number`, cut to start..stop: sample_id, user, item, scene and the uniforms of click and of potential conversion."""
    rng = generator(world.seed, 1, number)
    drawn = (*exposures(rng, world.items, world.users, CHUNK_ROWS), rng.random(CHUNK_ROWS), rng.random(CHUNK_ROWS))
    begin = number * CHUNK_ROWS
    cut = slice(max(start - begin, 0), min(stop - begin, CHUNK_ROWS))
    return (np.arange(begin + 1, begin + CHUNK_ROWS + 1)[cut], *(column[cut] for column in drawn))
