"""What the four flags mean: parsing, defaults and agreement, apart from SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from sglang_dcp.distributed.exchange import exchange_class
from sglang_dcp.distributed.exchange.symm_a2a_kernel import MAX_WORLD_SIZE
from sglang_dcp.distributed.topology import Layout, divisors


class DcpConfigError(ValueError):
    """A flag that cannot be honoured: names the flag, the value and the way out."""


@dataclass(frozen=True)
class DcpConfig:
    """The layout one attention pool runs with; exists only where `dcp_size` > 1.

    Attributes
    ----------
    layout : Layout
        `tp_size` ranks as `dcp_size` sequence shards x `attn_tp_size` head shards.
    comm_backend : str
        A name of `distributed.exchange.EXCHANGES`.
    replicate_q_proj : bool
        Hold the Q projection at attn_tp width, so that decode gathers no queries.
    page_size : int
        Tokens of a page in one rank's pool. SGLang's own `page_size` counts logical
        tokens: `page_size * dcp_size`.
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


def dcp_of(server_args: object) -> Optional[DcpConfig]:
    """The config of a server's arguments, None where DCP is off.

    Also for a plain `ServerArgs`, which somebody may have built from SGLang's class.
    """
    return getattr(server_args, "dcp", None)


def resolve_config(
    *,
    tp_size: int,
    dcp_size: Optional[int],
    attn_tp_size: Optional[int],
    comm_backend: str,
    replicate_q_proj: bool,
) -> Optional[DcpConfig]:
    """Turn flags into a config, or None where they leave attention at tp_size.

    `None` for a size means that the user did not give the flag. Either size implies
    the other; given both, `attn_tp_size * dcp_size` must be `tp_size`.

    Raises
    ------
    DcpConfigError
        For a size that does not divide, sizes that disagree, an unknown comm backend,
        or a flag that needs `--dcp-size` > 1 without it.
    """
    layout = _resolve_layout(tp_size, dcp_size, attn_tp_size)
    try:
        exchange_class(comm_backend)
    except ValueError as error:
        raise DcpConfigError(str(error)) from None
    if comm_backend == "symm_a2a" and layout.dcp_size > MAX_WORLD_SIZE:
        raise DcpConfigError(
            f"--dcp-comm-backend symm_a2a serves up to {MAX_WORLD_SIZE} KVP ranks, not "
            f"{layout.dcp_size}; use a2a or ag_rs, or a larger --attn-tp-size"
        )
    if layout.dcp_size > 1:
        return DcpConfig(layout, comm_backend, replicate_q_proj)
    if comm_backend != "ag_rs":
        raise DcpConfigError(
            f"--dcp-comm-backend {comm_backend} needs --dcp-size > 1, which is 1 here; "
            "add --dcp-size or drop the flag"
        )
    if replicate_q_proj:
        raise DcpConfigError(
            "--dcp-replicate-q-proj needs --dcp-size > 1, which is 1 here; "
            "add --dcp-size or drop the flag"
        )
    return None


def _resolve_layout(
    tp_size: int, dcp_size: Optional[int], attn_tp_size: Optional[int]
) -> Layout:
    for flag, value in (("--dcp-size", dcp_size), ("--attn-tp-size", attn_tp_size)):
        if value is None:
            continue
        if value < 1 or tp_size % value:
            raise DcpConfigError(
                f"{flag} {value} does not divide --tp-size {tp_size}; "
                f"use one of {divisors(tp_size)}"
            )
    if dcp_size is not None and attn_tp_size is not None:
        if dcp_size * attn_tp_size != tp_size:
            raise DcpConfigError(
                f"--attn-tp-size {attn_tp_size} and --dcp-size {dcp_size} disagree: "
                f"their product must be --tp-size {tp_size}; give one of the two"
            )
    if attn_tp_size is None:
        attn_tp_size = tp_size // (dcp_size or 1)
    return Layout(tp_size=tp_size, attn_tp_size=attn_tp_size)
