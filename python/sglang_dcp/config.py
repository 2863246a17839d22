"""The meaning of the four DCP flags. This module imports neither SGLang nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

from sglang_dcp.distributed.topology import Layout, divisors


class DcpConfigError(ValueError):
    """A flag cannot be served. The message names the flag, its value and a hint."""


class Replicas(NamedTuple):
    """How often DP attention replicates the attention layers, and the flag that says so."""

    number: int = 1
    flag: str = "--dp-size"


@dataclass(frozen=True)
class DcpConfig:
    """The layout and options of a server with DCP. It exists only if `dcp_size` > 1.

    Attributes
    ----------
    layout : Layout
        `tp_size` ranks as `dcp_size` shards of the sequence x `attn_tp_size` shards of
        the K/V heads. With DP attention these are the ranks of one replica.
    comm_backend : str
        A key of `distributed.exchange.EXCHANGES`.
    replicate_q_proj : bool
        Hold the Q projection at attn_tp width, so that decode gathers no queries.
    page_size : int
        Tokens of a page in one rank's pool. SGLang's `page_size` counts logical tokens:
        `page_size * dcp_size`.
    """

    layout: Layout
    comm_backend: str = "ag_rs"
    replicate_q_proj: bool = False
    page_size: int = 1

    @property
    def dcp_size(self) -> int:
        return self.layout.dcp_size

    @property
    def attn_tp_size(self) -> int:
        return self.layout.attn_tp_size

    @property
    def tp_size(self) -> int:
        return self.layout.tp_size

    @property
    def logical_page_size(self) -> int:
        """Tokens of a page as SGLang counts them."""
        return self.page_size * self.dcp_size


def dcp_of(server_args: object) -> Optional[DcpConfig]:
    """Return the config of a server's arguments, or None with DCP off.

    It accepts SGLang's original `ServerArgs` too, which other code may have built.
    """
    return getattr(server_args, "dcp", None)


def resolve_config(
    *,
    tp_size: int,
    dcp_size: Optional[int],
    attn_tp_size: Optional[int],
    comm_backend: Optional[str] = None,
    replicate_q_proj: Optional[bool] = None,
    default_comm_backend: str = "ag_rs",
    replicas: Replicas = Replicas(),
) -> Optional[DcpConfig]:
    """Turn flags into a config, or None if they leave DCP off.

    An argument is None if the user did not give the flag. Either size implies the other.
    If both are given, `attn_tp_size * dcp_size` must be `tp_size`, or with DP attention
    `tp_size / replicas.number`.

    Raises
    ------
    DcpConfigError
        A size does not divide `tp_size`, the sizes disagree, or a flag needs
        `--dcp-size` > 1.
    """
    layout = _resolve_layout(tp_size, dcp_size, attn_tp_size, replicas)
    if layout is not None and layout.dcp_size > 1:
        backend = comm_backend or default_comm_backend
        return DcpConfig(layout, backend, bool(replicate_q_proj))
    for flag, given in (
        (f"--dcp-comm-backend {comm_backend}", comm_backend),
        ("--dcp-replicate-q-proj", replicate_q_proj),
    ):
        if given:
            raise DcpConfigError(
                f"{flag} needs --dcp-size > 1, which is 1 here; add --dcp-size or drop "
                "the flag"
            )
    return None


def _resolve_layout(
    tp_size: int,
    dcp_size: Optional[int],
    attn_tp_size: Optional[int],
    replicas: Replicas,
) -> Optional[Layout]:
    """Return the layout of one replica, or None if no size was given."""
    given = {"--dcp-size": dcp_size, "--attn-tp-size": attn_tp_size}
    sizes = {flag: value for flag, value in given.items() if value is not None}
    if not sizes:
        return None
    if tp_size < 1:
        raise DcpConfigError(f"--tp-size {tp_size} must be at least 1")
    ranks, shown = _ranks_of_replica(tp_size, replicas)
    for flag, value in sizes.items():
        if value < 1 or ranks % value:
            raise DcpConfigError(
                f"{flag} {value} does not divide {shown}; "
                f"use one of {divisors(ranks)}{_fewer(tp_size, value, replicas)}"
            )
    if dcp_size is not None and attn_tp_size is not None:
        if dcp_size * attn_tp_size != ranks:
            raise DcpConfigError(
                f"--attn-tp-size {attn_tp_size} and --dcp-size {dcp_size} disagree: "
                f"their product must be {shown}; give one of the two"
            )
    if attn_tp_size is None:
        attn_tp_size = ranks // (dcp_size or 1)
    return Layout(ranks, attn_tp_size, replicas.number)


def _ranks_of_replica(tp_size: int, replicas: Replicas) -> tuple[int, str]:
    """Return the ranks that run attention for one batch, and how to show them."""
    number, flag = replicas
    if number < 1 or tp_size % number:
        raise DcpConfigError(
            f"{flag} {number} does not divide --tp-size {tp_size}, as DP attention needs; "
            f"use one of {divisors(tp_size)}"
        )
    if number == 1:
        return tp_size, f"--tp-size {tp_size}"
    ranks = tp_size // number
    return (
        ranks,
        f"the {ranks} ranks of a replica (--tp-size {tp_size} / {flag} {number})",
    )


def _fewer(tp_size: int, value: int, replicas: Replicas) -> str:
    """Name the numbers of replicas whose ranks `value` divides, with DP attention."""
    if replicas.number == 1 or value < 1:
        return ""
    fitting = [n for n in divisors(tp_size) if tp_size // n % value == 0]
    return f", or {replicas.flag} of {fitting}" if fitting else ""
