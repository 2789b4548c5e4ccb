"""The quantize stage: what of its config reaches the network."""

from __future__ import annotations

import pytest
import torch
from quantize_zoo import SPECS, checkpoint_of, images_for

from rescompress.config import QuantizeConfig
from rescompress.core.errors import BudgetError, ConfigError
from rescompress.stages.network import calibrated

torch.set_num_threads(1)


def quantized(**settings):
    return calibrated(checkpoint_of("pad"), images_for(SPECS["pad"], 4), QuantizeConfig(**settings), "tensorrt")


def test_layers_are_kept_in_float_by_name_by_number_or_not_at_all():
    spec = SPECS["pad"]
    assert quantized(calibration="max").quantization.keep_float(spec) == set()
    assert quantized(calibration="max", keep_float=["conv1", "fc"]).quantization.keep_float(spec) == {"conv1", "fc"}
    assert len(quantized(calibration="max", keep_float=2).quantization.keep_float(spec)) == 2
    assert quantized(calibration="max", keep_float="auto").quantization.keep_float(spec) == set()
    with pytest.raises(ConfigError, match="conv9"):
        quantized(keep_float=["conv9"])
    with pytest.raises(BudgetError, match="99 of 10 layers"):
        quantized(calibration="max", keep_float=99)


def test_estimator_percentile_and_bias_correction_reach_the_calibration():
    plain = quantized(calibration="max", bias_correction=False)
    assert all(torch.equal(v, checkpoint_of("pad").state_dict[k]) for k, v in plain.state_dict.items())
    assert not torch.equal(quantized(calibration="max").state_dict["bn1.bias"], plain.state_dict["bn1.bias"])
    loose = quantized(calibration="percentile", percentile=100.0).quantization
    tight = quantized(calibration="percentile", percentile=99.0).quantization
    assert loose.activation("relu1").scale == pytest.approx(plain.quantization.activation("relu1").scale)
    assert tight.activation("relu1").scale[0] < loose.activation("relu1").scale[0]
    assert quantized().provenance["calibration"]["tried"]
