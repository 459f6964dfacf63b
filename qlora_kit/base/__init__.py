"""The frozen base model: its files, its quantised formats, how it is loaded and how a weight is read."""

from qlora_kit.base.dense import QuantizedLinear, decode, linear_shape
from qlora_kit.base.formats import Quantization
from qlora_kit.base.hub import locate_model
from qlora_kit.base.load import load_base

__all__ = ["Quantization", "QuantizedLinear", "decode", "linear_shape", "load_base", "locate_model"]
