"""LoRA adapters on a frozen base: the layer, where it goes, how it starts, and its files."""

from qlora_kit.lora.adapters import load_adapter, save_adapter
from qlora_kit.lora.fingerprint import fingerprint
from qlora_kit.lora.inject import LoraReport, add_lora, add_recipe_lora, lora_layers
from qlora_kit.lora.layer import LoraLinear, adapter_parameters, adapters_off, use_adapter

__all__ = [
    "LoraLinear",
    "LoraReport",
    "adapter_parameters",
    "adapters_off",
    "add_lora",
    "add_recipe_lora",
    "fingerprint",
    "load_adapter",
    "lora_layers",
    "save_adapter",
    "use_adapter",
]
