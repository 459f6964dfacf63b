"""GGUF, the format of llama.cpp, Ollama and LM Studio, straight from the streaming merge; needs the package `gguf`."""

from qlora_kit.errors import RunError

try:
    import gguf  # noqa: F401
except ModuleNotFoundError as missing:
    raise RunError(
        "a GGUF export needs the package gguf, which is not installed; pip install 'gguf>=0.19'"
    ) from missing

from qlora_kit.export.gguf.adapter import export_gguf_adapter
from qlora_kit.export.gguf.export import check_gguf_request, export_gguf

__all__ = ["check_gguf_request", "export_gguf", "export_gguf_adapter"]
