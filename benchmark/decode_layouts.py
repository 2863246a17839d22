"""How attention is laid out over the ranks, by name; and which layouts make sense.

    tp                  SGLang without DCP
    DCP:COMM            this package's DCP
    DCP:COMM:q          the same with the Q projection replicated
    upstream:DCP        the DCP that SGLang has itself, this package out of the process
    upstream:DCP:q      the same with the Q projection replicated (latents, after 0.5.16)

Each may end in @BACKEND, its attention backend, where that is not the run's.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from bench_release import publishes
from decode_models import is_mla, kv_copies, kv_heads

UPSTREAM = "upstream"
# What serves DCP in SGLang 0.5.16 and 0.5.23 on Hopper; it takes others too and computes
# nonsense.
UPSTREAM_GQA, UPSTREAM_MLA = "triton", "flashinfer"


class Layout(NamedTuple):
    """One engine's layout; DCP 1 is SGLang without DCP."""

    name: str = "tp"
    dcp_size: int = 1
    comm: str = "-"
    q: str = "-"
    attention: str = ""  # before `resolved`: "" where the name says none

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read a name; ValueError for one that is none."""
        what, at, attention = text.partition("@")
        if at and not attention:
            raise ValueError(text)
        if what == "tp":
            return cls(text, attention=attention)
        first, second, *rest = what.split(":")
        if first == UPSTREAM:
            dcp_size, comm = int(second), UPSTREAM
        else:
            dcp_size, comm = int(first), second
        if rest not in ([], ["q"]) or dcp_size < 2:
            raise ValueError(text)
        return cls(
            text, dcp_size, comm, "replicated" if rest else "gathered", attention
        )

    @property
    def is_upstream(self) -> bool:
        return self.comm == UPSTREAM

    def resolved(self, model: str, attention: str) -> Layout:
        """With its attention backend, which the name tells where it is not the run's."""
        if self.attention:
            return self
        own = attention
        if self.is_upstream and attention != "torch_native":
            own = UPSTREAM_MLA if is_mla(model) else UPSTREAM_GQA
        name = self.name if own == attention else f"{self.name}@{own}"
        return self._replace(name=name, attention=own)


def default_layouts(model: str, tp: int, device: str) -> list[Layout]:
    """Layouts beside plain tensor parallelism, the one to recommend first.

    Where that stores no token twice there is nothing to win: what is left shows the cost.
    """
    if tp == 1:
        return []
    copies = kv_copies(model, tp)
    if copies == 1:
        names = [f"2:{comm}:q" for comm in ("symm_a2a", "a2a")]
        names += [f"{tp}:symm_a2a:q"]
    else:
        names = [f"{copies}:{how}" for how in ("symm_a2a:q", "symm_a2a", "a2a:q")]
        # Of latents SGLang's own DCP runs on FlashInfer alone: one of ours beside it.
        names += [f"{copies}:symm_a2a:q@{UPSTREAM_MLA}"] * is_mla(model)
        names += [f"{copies}:ag_rs", f"{tp}:symm_a2a:q", f"{UPSTREAM}:{copies}"]
    if device == "cpu":
        # Neither the peers' memory nor SGLang's own DCP.
        names = [f"{copies if copies > 1 else 2}:a2a:q", f"{tp}:ag_rs"]
    return [Layout.parse(name) for name in dict.fromkeys(names)]


def impossible(layout: Layout, model: str, tp: int, device: str) -> Optional[str]:
    """Why an engine of `upstream` would refuse to start, or time wrong results."""
    if not layout.is_upstream:
        return None
    if device == "cpu":
        return f"{layout.name}: SGLang's own DCP refuses to start on a CPU"
    if kv_heads(model) * layout.dcp_size > tp:
        return (
            f"{layout.name}: SGLang's own DCP computes wrong results where K/V heads "
            f"({kv_heads(model)}) x DCP ({layout.dcp_size}) exceed tp ({tp})"
        )
    if layout.q == "replicated" and not (is_mla(model) and publishes()):
        return f"{layout.name}: SGLang's own DCP replicates no Q projection here"
    known = UPSTREAM_MLA if is_mla(model) else UPSTREAM_GQA
    if layout.attention not in ("", known):
        return (
            f"{layout.name}: SGLang's own DCP of this model is made for {known} and "
            f"computes wrong results on {layout.attention}"
        )
    return None
