"""Export: what was trained, as files that other programs read, each audited against the model as trained."""

from qlora_kit.export.adapter import export_adapter
from qlora_kit.export.audit import compare
from qlora_kit.export.merge import merged_tensors, rehearse_merge
from qlora_kit.export.plain import export_merged, merge, save_model
from qlora_kit.export.quantized import export_quantized
from qlora_kit.export.sealed import check_request
from qlora_kit.export.stream import StreamedTensor, write_safetensors, write_weights
from qlora_kit.export.trained_against import trained_against

__all__ = [
    "StreamedTensor",
    "check_request",
    "compare",
    "export_adapter",
    "export_merged",
    "export_quantized",
    "merge",
    "merged_tensors",
    "rehearse_merge",
    "save_model",
    "trained_against",
    "write_safetensors",
    "write_weights",
]
