"""Leaf types, one file a method; `METHODS` is what `--method` names."""

from jaxllm.quantization.int_tensor import Int8, IntTensor
from jaxllm.quantization.parameters import Quantizer, input_axis, quantize_params

METHODS = {
    "int8": Int8,
}

LEAVES = {
    "IntTensor": IntTensor,
}

__all__ = [
    "LEAVES",
    "METHODS",
    "Int8",
    "IntTensor",
    "Quantizer",
    "input_axis",
    "quantize_params",
]
