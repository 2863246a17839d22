"""What differs between SGLang releases, as small functions with one meaning.

`sglang_api()` returns the functions for the installed release. Nothing else branches on a
version, except the tables of hooks and of unsupported arguments, whose rows say from which
release to which they hold.

This module imports SGLang only inside of functions.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from sglang_dcp.releases.installed import by_number, sglang_version

# First release that each module serves, oldest first.
_MODULES = {
    "0.5.16": "sglang_dcp.releases.v0_5_16",
    "0.5.23": "sglang_dcp.releases.v0_5_23",
}


def served_numbers() -> list[str]:
    """List the numbers of the releases that have functions here, oldest first."""
    return list(_MODULES)


def is_served(version: str) -> bool:
    """Whether the functions here were written for the release with this number.

    What follows the three numbers does not count, as in a fork's `0.5.23.post1`.
    """
    return by_number(version)[:3] in map(by_number, _MODULES)


class SglangApi(ABC):
    """SGLang's functions whose place or form depends on the release."""

    @abstractmethod
    def resolved(self, server_args: Any) -> Any:
        """Return an object whose attributes are the arguments as SGLang resolved them."""

    @abstractmethod
    def declare(self, server_args: Any, source: str, **fields: Any) -> None:
        """Set arguments to what `source` decided, where `resolved` shows them."""

    @abstractmethod
    def model_config(self, server_args: Any) -> Any:
        """Return SGLang's `ModelConfig` of these arguments."""

    @abstractmethod
    def uses_mla(self, server_args: Any) -> bool:
        """Whether SGLang serves the model with latent attention."""

    @abstractmethod
    def has_prefill_graph(self, server_args: Any) -> bool:
        """Whether the resolved arguments have a prefill CUDA graph."""

    @abstractmethod
    def turn_off_prefill_graph(self, server_args: Any) -> bool:
        """Turn off the prefill CUDA graph. Return False if it was off already."""

    @abstractmethod
    def hide_dcp_size(self, server_args: Any) -> None:
        """Set SGLang's own `dcp_size` to 1 in a scheduler process, where it is not."""

    @abstractmethod
    def scheduler_tp_rank(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> int:
        """Return the rank of a scheduler process in its tensor-parallel group.

        `args` and `kwargs` are those of `configure_scheduler_process` after `gpu_id`.
        """

    @abstractmethod
    def attention_replicas(self, server_args: Any) -> tuple[int, str]:
        """Return the number of replicas of DP attention, and the flag that names it.

        Arguments may be resolved or not. Without DP attention the number is 1.
        """

    @abstractmethod
    def binding_ranks(self, sizes: Mapping[str, int]) -> int:
        """Return the number of ranks from the arguments of `init_threads_binding`."""

    @abstractmethod
    def group_options(self) -> dict[str, bool]:
        """Return what turns off all-reduce kernels in `init_model_parallel_group`."""

    @abstractmethod
    def kv_indices_kernel(self) -> Any:
        """Return the Triton kernel `create_flashinfer_kv_indices_triton`."""

    @abstractmethod
    def cached_tokens(self, req: Any) -> int:
        """Count the tokens of a scheduler's `Req` whose K/V are in the pool."""

    @abstractmethod
    def attn_tp_partition(
        self, attn_tp_rank: int, attn_tp_size: int, dcp_size: int
    ) -> dict[str, Any]:
        """Return what gives a column-parallel attention layer the width attn_tp.

        They are arguments of the layer's constructor. The ranks of a DCP group then hold
        the same outputs. SGLang's own attention width is `attn_tp_size * dcp_size`.
        """

    @abstractmethod
    def keep_quant_method_of_q_b(self, attention: Any) -> None:
        """Turn off a kernel of DeepSeek's attention that reads `q_b_proj.weight` itself.

        It would bypass the layer's `quant_method`, which chooses the rank's own outputs.
        """


@functools.cache
def sglang_api() -> SglangApi:
    """Return the functions for the installed SGLang.

    For a release between two known ones these are the functions of the older. No server
    with DCP starts there, because its source is not known.
    """
    version = by_number(sglang_version())
    fitting = [name for name in _MODULES if by_number(name) <= version]
    module = importlib.import_module(_MODULES[(fitting or list(_MODULES))[-1]])
    api: SglangApi = module.API
    return api
