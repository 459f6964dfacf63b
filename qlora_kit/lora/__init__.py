"""LoRA adapters on a frozen base: the layer, where it goes, how it starts, several of them, and their files."""

from qlora_kit.lora.adapters import load_adapter, save_adapter
from qlora_kit.lora.inject import LoraReport, add_lora, add_recipe_lora, base_parameter_count
from qlora_kit.lora.layer import LoraLinear, adapter_constants, adapter_parameters, lora_layers
from qlora_kit.lora.several import (
    adapter_names,
    adapter_used,
    adapters_off,
    combine_adapters,
    delete_adapter,
    use_adapter,
)
from qlora_kit.lora.start import REFERENCE, adapter_folder, load_reference, load_start, shaped

__all__ = [
    "REFERENCE",
    "LoraLinear",
    "LoraReport",
    "adapter_constants",
    "adapter_folder",
    "adapter_names",
    "adapter_parameters",
    "adapter_used",
    "adapters_off",
    "add_lora",
    "add_recipe_lora",
    "base_parameter_count",
    "combine_adapters",
    "delete_adapter",
    "load_adapter",
    "load_reference",
    "load_start",
    "lora_layers",
    "save_adapter",
    "shaped",
    "use_adapter",
]
