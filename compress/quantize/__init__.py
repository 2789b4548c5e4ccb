"""INT8: calibration, fake quantization, quantization-aware training."""

from compress.quantize.fake_quant import fake_quant_model, integer_weights, integers
from compress.quantize.ptq import ptq
from compress.quantize.qat import finish_qat, prepare_qat

__all__ = ["fake_quant_model", "finish_qat", "integer_weights", "integers", "prepare_qat", "ptq"]
