"""Pure rank arithmetic: which ranks form a group, which heads a rank holds.

One pool of ``tp_size`` ranks runs attention as ``dcp_size`` (KVP) x ``attn_tp_size``
(TPA). ``tp_rank`` is a rank's index inside its tensor-parallel pool, never a global
rank. Nothing here is imported but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Sequence

__all__ = ["Layout", "divisors"]


def divisors(number: int) -> List[int]:
    """Divisors of a positive number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(str(size) for size in sizes)


@dataclass(frozen=True)
class Layout:
    """The KVP x TPA grid over one tensor-parallel pool.

    ``tp_rank = attn_tp_rank * dcp_size + kvp_rank``. With this order the chunk of a
    head shard that the exchange leaves on a rank is the rank's plain TP slice of the
    heads, which is the input that ``o_proj`` at width ``tp_size`` expects.

    Parameters
    ----------
    tp_size
        Ranks of one pool (``--tp-size`` of a data-parallel replica).
    attn_tp_size
        Ranks over which K/V heads are sharded (``--attn-tp-size``); divides
        ``tp_size``. ``--dcp-size`` is the quotient.

    Raises
    ------
    ValueError
        A size below one, or ``attn_tp_size`` not a divisor of ``tp_size``.
    """

    tp_size: int
    attn_tp_size: int

    def __post_init__(self) -> None:
        for flag, size in (
            ("--tp-size", self.tp_size),
            ("--attn-tp-size", self.attn_tp_size),
        ):
            if size < 1:
                raise ValueError(f"{flag} is {size}; it has to be at least 1.")
        if self.tp_size % self.attn_tp_size:
            widths = divisors(self.tp_size)
            raise ValueError(
                f"--attn-tp-size {self.attn_tp_size} does not divide "
                f"--tp-size {self.tp_size}, so no --dcp-size makes "
                "attn-tp-size x dcp-size = tp-size. Use --attn-tp-size "
                f"{_listed(widths)} (--dcp-size {_listed(widths[::-1])})."
            )

    @property
    def dcp_size(self) -> int:
        """KVP: ranks that share K/V heads and split the sequence."""
        return self.tp_size // self.attn_tp_size

    def kvp_rank(self, tp_rank: int) -> int:
        """Index of ``tp_rank`` among the ranks that split its sequence."""
        self._check_rank(tp_rank)
        return tp_rank % self.dcp_size

    def attn_tp_rank(self, tp_rank: int) -> int:
        """Index of the head shard that ``tp_rank`` holds."""
        self._check_rank(tp_rank)
        return tp_rank // self.dcp_size

    def kvp_groups(self, tp_groups: Sequence[Sequence[int]]) -> List[List[int]]:
        """Ranks that share K/V heads: ``dcp_size`` neighbours of each TP group.

        Parameters
        ----------
        tp_groups
            Global ranks of every TP group, in ``tp_rank`` order.

        Returns
        -------
        Global ranks of every KVP group, in ``kvp_rank`` order.
        """
        self._check_groups(tp_groups)
        return [
            list(ranks[start : start + self.dcp_size])
            for ranks in tp_groups
            for start in range(0, self.tp_size, self.dcp_size)
        ]

    def attn_tp_groups(self, tp_groups: Sequence[Sequence[int]]) -> List[List[int]]:
        """Ranks with equal ``kvp_rank``: every ``dcp_size``-th of each TP group.

        Takes what `kvp_groups` takes; the groups are in ``attn_tp_rank`` order.
        """
        self._check_groups(tp_groups)
        return [
            list(ranks[start :: self.dcp_size])
            for ranks in tp_groups
            for start in range(self.dcp_size)
        ]

    def check_heads(self, q_heads: int, kv_heads: int) -> None:
        """Raise unless the model's heads can be cut for this layout.

        Q heads are cut over ``tp_size``. K/V heads are cut over ``attn_tp_size``, or
        replicated evenly when there are fewer of them, as SGLang's QKV layer does.

        Parameters
        ----------
        q_heads, kv_heads
            Totals of the model. MLA has one latent head: pass ``kv_heads=1``.

        Raises
        ------
        ValueError
            Names the flag, its value and the sizes that work.
        """
        if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
            raise ValueError(
                f"The model has {q_heads} query heads and {kv_heads} KV heads; "
                "--dcp-size needs whole numbers of query heads per KV head. Serve it "
                "without --dcp-size and --attn-tp-size."
            )
        if q_heads % self.tp_size:
            widths = [size for size in divisors(q_heads) if size <= self.tp_size]
            raise ValueError(
                f"--tp-size {self.tp_size} does not divide the model's {q_heads} "
                f"query heads. Use --tp-size {_listed(widths)}."
            )
        if not self._cuts_kv_heads(kv_heads, self.attn_tp_size):
            widths = divisors(self.tp_size)
            widths = [size for size in widths if self._cuts_kv_heads(kv_heads, size)]
            raise ValueError(
                f"--attn-tp-size {self.attn_tp_size} (--dcp-size {self.dcp_size}) "
                f"neither divides the model's {kv_heads} KV heads nor is a multiple "
                f"of them. With --tp-size {self.tp_size} use --attn-tp-size "
                f"{_listed(widths)} (--dcp-size "
                f"{_listed([self.tp_size // size for size in widths])})."
            )

    def kv_heads_per_rank(self, kv_heads: int) -> int:
        """K/V heads that each rank holds; 1 when they are replicated."""
        if not self._cuts_kv_heads(kv_heads, self.attn_tp_size):
            raise ValueError(
                f"{kv_heads} KV heads cannot be cut over --attn-tp-size "
                f"{self.attn_tp_size}; check_heads() lists the sizes that work."
            )
        return max(1, kv_heads // self.attn_tp_size)

    def kv_shard(self, kv_heads: int, tp_rank: int) -> range:
        """The model's K/V heads that ``tp_rank`` holds, in local order."""
        width = self.kv_heads_per_rank(kv_heads)
        first = self.attn_tp_rank(tp_rank) * kv_heads // self.attn_tp_size
        return range(first, first + width)

    @staticmethod
    def _cuts_kv_heads(kv_heads: int, width: int) -> bool:
        return kv_heads % width == 0 or width % kv_heads == 0

    def _check_rank(self, tp_rank: int) -> None:
        if not 0 <= tp_rank < self.tp_size:
            raise ValueError(
                f"tp_rank {tp_rank} is outside --tp-size {self.tp_size}; pass the "
                "rank inside its tensor-parallel group, not the global rank."
            )

    def _check_groups(self, tp_groups: Sequence[Sequence[int]]) -> None:
        for ranks in tp_groups:
            if len(ranks) != self.tp_size:
                raise ValueError(
                    f"A tensor-parallel group has {len(ranks)} ranks, --tp-size is "
                    f"{self.tp_size}; pass groups of --tp-size global ranks."
                )
