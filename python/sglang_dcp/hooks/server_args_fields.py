"""The DCP flags as fields of SGLang's `ServerArgs`, for both of its forms."""

# No lazy annotations: SGLang would evaluate them with the names of another module.

import argparse
from typing import Annotated, Any, NamedTuple, Optional


class Field(NamedTuple):
    """One field: its name, its annotated type and its default."""

    name: str
    annotation: Any
    default: Any


def dcp_fields(*markers: Any) -> tuple[Field, ...]:
    """Return the four flags. `markers` are added to the field that SGLang lacks.

    Every default is None, so that a flag that was given can be told from one that was not.
    """
    from sglang.srt.arg_groups.arg_utils import Arg

    return (
        Field(
            "dcp_size",
            Annotated[
                Optional[int],
                Arg(
                    help="Decode context parallelism: ranks that share K/V heads and "
                    "split the sequence. Divides --tp-size. Default: tp-size / "
                    "attn-tp-size.",
                    aliases=["--decode-context-parallel-size"],
                    resolvable=True,
                ),
            ],
            None,
        ),
        Field(
            "attn_tp_size",
            Annotated[
                (
                    Optional[int],
                    Arg(
                        help="Ranks over which K/V heads are sharded; the rest of "
                        "--tp-size splits the sequence. attn-tp-size x dcp-size = "
                        "tp-size, and either implies the other.",
                        aliases=["--attention-tensor-parallel-size"],
                    ),
                    *markers,
                )
            ],
            None,
        ),
        Field(
            "dcp_comm_backend",
            Annotated[
                Optional[str],
                Arg(
                    help="How the ranks' partial attention outputs are combined: "
                    f"{_described_exchanges()}. Default: a2a on GPUs, ag_rs on CPUs.",
                    resolvable=True,
                ),
            ],
            None,
        ),
        Field(
            "dcp_replicate_q_proj",
            Annotated[
                Optional[bool],
                Arg(
                    help="Hold the Q projection at attn-tp width, so that decode gathers "
                    "no queries. Costs dcp-size times the Q weights of a rank.",
                    action=argparse.BooleanOptionalAction,
                    resolvable=True,
                ),
            ],
            None,
        ),
    )


def _described_exchanges() -> str:
    from sglang_dcp.distributed.exchange import EXCHANGES

    return "; ".join(f"{name}, {found.summary}" for name, found in EXCHANGES.items())
