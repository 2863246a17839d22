"""Pure rank arithmetic: which ranks form a group, and which heads a rank holds.

One pool of ``tp_size`` ranks runs attention as ``dcp_size`` x ``attn_tp_size``. It is a
tensor-parallel group, or one replica of DP attention in it. ``tp_rank`` is a rank's index
inside its pool, never a global rank. Only the standard library is imported.
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


def _cuts_kv_heads(kv_heads: int, width: int) -> bool:
    return kv_heads % width == 0 or width % kv_heads == 0


# A message lists layouts of up to this many ranks. Few servers have more.
_MAX_LISTED_TP = 64


def _layouts(
    q_heads: int, kv_heads: int, replicas: int, tp_size: int | None = None
) -> str:
    """List each tensor-parallel size that the heads allow, with its DCP sizes above 1.

    ``tp_size`` is that of a pool. The flag counts the ranks of all replicas.
    """
    widths = [tp_size] if tp_size else divisors(q_heads)
    sizes = {
        width: [
            size
            for size in divisors(width)[1:]
            if _cuts_kv_heads(kv_heads, width // size)
        ]
        for width in widths
        if width <= _MAX_LISTED_TP
    }
    shown = [
        f"--tp-size {width * replicas} (--dcp-size {_listed(found)})"
        for width, found in sizes.items()
        if found
    ]
    return " or ".join(shown) or "it without --dcp-size and --attn-tp-size"


@dataclass(frozen=True)
class Layout:
    """The dcp_size x attn_tp_size grid over one pool of ranks.

    The rank order is ``tp_rank = attn_tp_rank * dcp_size + dcp_rank``. With this order,
    the heads that the exchange leaves on a rank are its ordinary tensor-parallel slice.
    ``o_proj`` at width ``tp_size`` expects exactly that slice.

    Parameters
    ----------
    tp_size
        Ranks of one pool, which run attention for the same batch. It is ``--tp-size``.
        With DP attention it is a replica's part of that.
    attn_tp_size
        Ranks over which K/V heads are sharded (``--attn-tp-size``). It divides
        ``tp_size``. ``--dcp-size`` is the quotient.
    replicas
        Pools in one tensor-parallel group of SGLang: the replicas of DP attention.

    Raises
    ------
    ValueError
        A size is below one, or ``attn_tp_size`` does not divide ``tp_size``.
    """

    tp_size: int
    attn_tp_size: int
    replicas: int = 1

    def __post_init__(self) -> None:
        for flag, size in (
            ("--tp-size", self.tp_size),
            ("--attn-tp-size", self.attn_tp_size),
            ("--dp-size", self.replicas),
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
        """Number of ranks that share K/V heads and split the sequence.

        The Helix paper (arXiv 2507.07120) calls it KVP.
        """
        return self.tp_size // self.attn_tp_size

    def dcp_rank(self, tp_rank: int) -> int:
        """Return the index of ``tp_rank`` in its DCP group."""
        self._check_rank(tp_rank)
        return tp_rank % self.dcp_size

    def attn_tp_rank(self, tp_rank: int) -> int:
        """Return the index of the attn_tp shard of K/V heads that ``tp_rank`` holds."""
        self._check_rank(tp_rank)
        return tp_rank // self.dcp_size

    def dcp_groups(self, tp_groups: Sequence[Sequence[int]]) -> List[List[int]]:
        """List the ranks that share K/V heads: ``dcp_size`` neighbours of each pool.

        Parameters
        ----------
        tp_groups
            Global ranks of every pool, in ``tp_rank`` order.

        Returns
        -------
        Global ranks of every DCP group, in ``dcp_rank`` order.
        """
        self._check_groups(tp_groups)
        return [
            list(ranks[start : start + self.dcp_size])
            for ranks in tp_groups
            for start in range(0, self.tp_size, self.dcp_size)
        ]

    def attn_tp_groups(self, tp_groups: Sequence[Sequence[int]]) -> List[List[int]]:
        """List the ranks with equal ``dcp_rank``: every ``dcp_size``-th of each pool.

        Takes the argument of `dcp_groups`. Each group is in ``attn_tp_rank`` order.
        """
        self._check_groups(tp_groups)
        return [
            list(ranks[start :: self.dcp_size])
            for ranks in tp_groups
            for start in range(self.dcp_size)
        ]

    def groups_inside_nodes(self, ranks_per_node: int) -> bool:
        """Whether each DCP group lies inside a node of ``ranks_per_node`` TP ranks.

        A DCP group is a run of ``dcp_size`` ranks, and a node is a run of ranks. So groups
        lie inside of nodes wherever any rank order could make them.
        """
        return ranks_per_node % self.dcp_size == 0

    def check_heads(self, q_heads: int, kv_heads: int) -> None:
        """Raise unless the model's heads can be sharded for this layout.

        Q heads are sharded over ``tp_size``. K/V heads are sharded over
        ``attn_tp_size``. If there are fewer K/V heads, they are replicated evenly, as
        SGLang's QKV layer does.

        Parameters
        ----------
        q_heads, kv_heads
            Numbers of the whole model. MLA has one latent head: pass ``kv_heads=1``.

        Raises
        ------
        ValueError
            The message names the flag, its value and the sizes that work.
        """
        if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
            raise ValueError(
                f"The model has {q_heads} query heads and {kv_heads} KV heads; "
                "--dcp-size needs whole numbers of query heads per KV head. Serve it "
                "without --dcp-size and --attn-tp-size."
            )
        if q_heads % self.tp_size:
            raise ValueError(
                f"{self._shown_size} does not divide the model's {q_heads} "
                f"query heads. Use {_layouts(q_heads, kv_heads, self.replicas)}."
            )
        if not _cuts_kv_heads(kv_heads, self.attn_tp_size):
            raise ValueError(
                f"--attn-tp-size {self.attn_tp_size} (--dcp-size {self.dcp_size}) "
                f"neither divides the model's {kv_heads} KV heads nor is a multiple "
                "of them. Use "
                f"{_layouts(q_heads, kv_heads, self.replicas, self.tp_size)}."
            )

    def kv_heads_per_rank(self, kv_heads: int) -> int:
        """Return the number of K/V heads on each rank; 1 if they are replicated.

        Raises ValueError if the K/V heads cannot be sharded for this layout.
        """
        if not _cuts_kv_heads(kv_heads, self.attn_tp_size):
            raise ValueError(
                f"{kv_heads} KV heads cannot be cut over --attn-tp-size "
                f"{self.attn_tp_size}; check_heads() lists the sizes that work."
            )
        return max(1, kv_heads // self.attn_tp_size)

    def kv_shard(self, kv_heads: int, tp_rank: int) -> range:
        """Return the model's K/V heads that ``tp_rank`` holds, in local order."""
        width = self.kv_heads_per_rank(kv_heads)
        first = self.attn_tp_rank(tp_rank) * kv_heads // self.attn_tp_size
        return range(first, first + width)

    @property
    def _shown_size(self) -> str:
        if self.replicas == 1:
            return f"--tp-size {self.tp_size}"
        whole = self.tp_size * self.replicas
        return (
            f"--tp-size {whole} / {self.replicas} replicas, {self.tp_size} ranks each,"
        )

    def _check_rank(self, tp_rank: int) -> None:
        if not 0 <= tp_rank < self.tp_size:
            raise ValueError(
                f"tp_rank {tp_rank} is outside --tp-size {self.tp_size}; pass the "
                "rank inside its pool, not the global rank."
            )

    def _check_groups(self, tp_groups: Sequence[Sequence[int]]) -> None:
        for ranks in tp_groups:
            if len(ranks) != self.tp_size:
                raise ValueError(
                    f"A tensor-parallel group has {len(ranks)} ranks, --tp-size is "
                    f"{self.tp_size}; pass groups of --tp-size global ranks."
                )
