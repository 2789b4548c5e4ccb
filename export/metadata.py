"""What our own ONNX files say about themselves: the network, its preprocessing and labels, the profile of its quantizers.

Apart from the writer, so that a reader of files loads no library that writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import onnx

from rescompress.core.errors import BadInput
from rescompress.core.graph import Network
from rescompress.core.quantizers import PROFILES, Profile, Quantization
from rescompress.core.spec import ModelSpec, Preprocessing

_SPEC = "rescompress.spec"
_NETWORK = "rescompress.network"
_LABELS = "rescompress.labels"
_PREPROCESSING = "rescompress.preprocessing"
_PROFILE = "rescompress.profile"


@dataclass(frozen=True)
class ExportedModel:
    """What a file of ours says about itself.

    Attributes:
        spec: The network, with labels and preprocessing.
        profile: Placement profile of its quantizers, or None for a float file.
    """

    spec: ModelSpec | Network
    profile: Profile | None


def metadata_of(spec: ModelSpec | Network, quantization: Quantization | None) -> dict[str, str]:
    """Return what a file of this network says about itself."""
    stored = spec.model_dump(mode="json", exclude={"labels", "preprocessing"})
    props = {
        _SPEC if isinstance(spec, ModelSpec) else _NETWORK: json.dumps(stored, separators=(",", ":")),
        _PREPROCESSING: spec.preprocessing.model_dump_json(),
    }
    if spec.labels is not None:
        props[_LABELS] = json.dumps(spec.labels, separators=(",", ":"), ensure_ascii=False)
    if quantization is not None:
        props[_PROFILE] = quantization.profile
    return props


def read_metadata(model: onnx.ModelProto) -> ExportedModel | None:
    """Return what `metadata_of` stored in the model, or None where somebody else wrote it.

    Raises:
        BadInput: The metadata is ours but cannot be read.
    """
    props = {p.key: p.value for p in model.metadata_props}
    key = next((key for key in (_SPEC, _NETWORK) if key in props), None)
    if key is None:
        return None
    try:
        stored = json.loads(props[key])
        if not isinstance(stored, dict):
            raise ValueError(f"{key} is no mapping")
        kind: type[ModelSpec | Network] = ModelSpec if key == _SPEC else Network
        spec = kind.model_validate(
            {
                **stored,
                "labels": json.loads(props[_LABELS]) if _LABELS in props else None,
                "preprocessing": Preprocessing.model_validate_json(props[_PREPROCESSING]),
            }
        )
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        lacks = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise BadInput(f"the metadata of the ONNX file cannot be read: {lacks}", remedy="export the checkpoint again") from e
    named = props.get(_PROFILE)
    profile = next((known for known in PROFILES if known == named), None)
    if named is not None and profile is None:
        raise BadInput(f"the ONNX file names a profile that is not known here: {named}", remedy="export the checkpoint again")
    return ExportedModel(spec, profile)
