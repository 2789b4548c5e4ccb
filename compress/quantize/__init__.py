"""INT8: calibration, fake quantization, quantization-aware training, mixed precision."""

from compress.quantize.bias_grid import on_grid
from compress.quantize.fake_quant import fake_quant_model, integer_weights, integers
from compress.quantize.integer import integer_model
from compress.quantize.ptq import ptq
from compress.quantize.qat import best_of, finish_qat, prepare_qat
from compress.quantize.sensitivity import Cost, LayerSensitivity, MixedPrecision, mixed_precision, restrict, sensitivities

__all__ = [
    "Cost",
    "LayerSensitivity",
    "MixedPrecision",
    "best_of",
    "fake_quant_model",
    "finish_qat",
    "integer_model",
    "integer_weights",
    "integers",
    "mixed_precision",
    "on_grid",
    "prepare_qat",
    "ptq",
    "restrict",
    "sensitivities",
]
