"""A plugin that lets all ranks of a server share GPU 0, over gloo.

NCCL refuses two ranks on one GPU. Kernels, pools and plans are those of a GPU; only the
collectives differ, so decode runs eagerly and `symm_a2a` cannot run.
"""

from __future__ import annotations

from helpers import teacher_forcing

FLAGS = "--disable-cuda-graph --disable-custom-all-reduce"

_SHARED = """

def on_gpu_zero(original, self, server_args, port_args, gpu_id, *args, **kwargs):
    return original(self, server_args, port_args, 0, *args, **kwargs)


def placed_on_gpu_zero(original, *args, ranks=None, **kwargs):
    import msgspec

    if ranks is not None:
        ranks = msgspec.structs.replace(ranks, gpu_id=0)
    return original(*args, ranks=ranks, **kwargs)


def over_gloo(original, device):
    return "gloo"


def without_nccl(original, *args, **kwargs):
    return original(*args, **{**kwargs, "use_pynccl": False})


def load():
    load_first()
    from sglang.srt import runtime_context
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Since 0.5.21 the launcher publishes a process's place, and the scheduler reads it.
    placed = hasattr(runtime_context, "SpawnRanks")
    place = {
        "runtime_context.publish": placed_on_gpu_zero,
    } if placed else {
        "managers.scheduler.Scheduler.__init__": on_gpu_zero,
    }
    for target, hook in {
        **place,
        "distributed.bootstrap.get_default_distributed_backend": over_gloo,
        "distributed.parallel_state.init_model_parallel_group": without_nccl,
    }.items():
        HookRegistry.register(f"sglang.srt.{target}", hook, HookType.AROUND)
"""


def sharing(plugin: str) -> str:
    """Source of a plugin that does what `plugin` does, and lets the ranks share GPU 0."""
    assert "def load():" in plugin
    return plugin.replace("def load():", "def load_first():") + _SHARED


PLUGIN = sharing(teacher_forcing.PLUGIN)
