"""The plugin's `ServerArgs`: SGLang's class with the DCP flags."""

from sglang.srt.server_args import ServerArgs

from sglang_dcp.hooks.server_args import extend_server_args

DcpServerArgs = extend_server_args(ServerArgs, __name__, "DcpServerArgs")
