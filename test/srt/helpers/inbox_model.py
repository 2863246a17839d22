"""The inbox protocol of `symm_a2a.cu` as a state machine, a word at a time.

Each rank runs its calls one after the other. A call takes the first `chunks` chunks of an
inbox. A block per chunk stores one word to each peer, in any order. Then it polls one word
from each peer, in any order, and empties all of them once it has them. Stores arrive in any
order, also those of later calls, except that a rank's stores to its own inbox are done
before its next call. Whoever steps next is drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Optional

EMPTY = None
# What a word holds: its sender, and the sender's number of the call.
Word = tuple[int, int]
Place = tuple[int, int, int]  # sender, chunk, parity


class ProtocolError(Exception):
    """A word was lost, or went to the wrong call."""


@dataclass
class Rank:
    """Inbox, counters and where the rank is in its calls."""

    number: int
    inbox: dict[Place, Word] = field(default_factory=dict)
    uses: dict[int, int] = field(default_factory=dict)


class Network:
    """Stores on their way: those of one rank to another may overtake each other."""

    def __init__(self, ranks: Sequence[Rank], rng: random.Random) -> None:
        self._ranks, self._rng = ranks, rng
        self._flying: list[tuple[int, Place, Word]] = []

    def store(self, owner: int, place: Place, word: Word) -> None:
        self._flying.append((owner, place, word))

    def deliver_one(self) -> bool:
        if not self._flying:
            return False
        chosen = self._rng.randrange(len(self._flying))
        owner, place, word = self._flying.pop(chosen)
        inbox = self._ranks[owner].inbox
        if place in inbox:
            raise ProtocolError(f"rank {owner}, {place}: {word} over {inbox[place]}")
        inbox[place] = word
        return True


def _call(
    rank: Rank,
    world_size: int,
    call: int,
    chunks: int,
    places: int,
    network: Network,
    rng: random.Random,
) -> Generator[None, None, None]:
    """One kernel; a yield is where others may go on."""
    blocks = [
        _block(rank, world_size, call, chunk, places, network, rng)
        for chunk in range(chunks)
    ]
    # The kernel ends when all of its blocks have.
    while blocks:
        block = rng.choice(blocks)
        try:
            next(block)
        except StopIteration:
            blocks.remove(block)
        yield


def _block(
    rank: Rank,
    world_size: int,
    call: int,
    chunk: int,
    places: int,
    network: Network,
    rng: random.Random,
) -> Generator[None, None, None]:
    use = rank.uses.get(chunk, 0)
    peers = [peer for peer in range(world_size) if peer != rank.number]
    for peer in rng.sample(peers, len(peers)):
        place = rank.number, chunk, use % places
        network.store(peer, place, (rank.number, call))
        yield
    sources = [(peer, chunk, use % places) for peer in peers]
    while any(rank.inbox.get(source, EMPTY) is EMPTY for source in sources):
        yield
    for source in rng.sample(sources, len(sources)):
        word = rank.inbox.pop(source)
        if word != (source[0], call):
            raise ProtocolError(f"rank {rank.number}, call {call}: got {word}")
        yield
    rank.uses[chunk] = use + 1


def run(
    world_size: int,
    calls: Sequence[int],
    places: int,
    seed: int,
    skipped: Optional[tuple[int, int]] = None,
) -> None:
    """Run calls of `calls[i]` chunks on all ranks; ProtocolError, also for a deadlock.

    `skipped` names a rank and the call that it leaves out.
    """
    rng = random.Random(seed)
    ranks = [Rank(number) for number in range(world_size)]
    network = Network(ranks, rng)

    def program(rank: Rank) -> Generator[None, None, None]:
        for call, chunks in enumerate(calls):
            if (rank.number, call) == skipped:
                continue
            yield from _call(rank, world_size, call, chunks, places, network, rng)

    programs = {rank.number: program(rank) for rank in ranks}
    # Some ranks are slow, the network too.
    weights = {number: rng.choice((1, 5, 25)) for number in (*programs, world_size)}
    steps = 0
    while programs:
        steps += 1
        if steps > 200_000:
            raise ProtocolError("deadlock")
        movable = [*programs, world_size]
        chosen = rng.choices(movable, [weights[number] for number in movable])[0]
        if chosen == world_size:
            network.deliver_one()
            continue
        try:
            next(programs[chosen])
        except StopIteration:
            del programs[chosen]
    if any(rank.inbox for rank in ranks):
        raise ProtocolError("words were left behind")
