"""Reads the weights of a ``torch.export`` archive (``.pt2``) without running its program.

Layout (torch.export.save, archive version 0; ``torch/export/pt2_archive/constants.py`` of torch 2.9 and later): a zip file
with ``<name>/data/weights/<model>_weights_config.json``, which maps each parameter and buffer to a member beside it and to
its dtype, sizes, strides and offset.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints import pickles
from compress.checkpoints.files import EXPORTED_TABLE, Opened, ZipStorages, read_member, unique_pairs
from compress.checkpoints.programs import SCALAR, Operators, Unknown, in_float
from rescompress.core.errors import CheckpointError

MAX_CONFIG_BYTES = 100_000_000

_DTYPES = {  # torch/_export/serde/schema.py, ScalarType
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


def open_exported(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> Opened:
    """Return the parameters and buffers of an exported program, by name; they stay in the file until they are read.

    Args:
        path: The archive.
        members: Its members by name, at least one of them with a name that ends in `EXPORTED_TABLE`.

    Raises:
        CheckpointError: The archive is damaged, holds several models, or a weight that is stored as a pickle.
    """
    configs = [name for name in members if name.endswith(EXPORTED_TABLE)]
    if len(configs) != 1:
        raise CheckpointError(f"holds {len(configs)} exported models", remedy="export one network into a file of its own")
    tensors = _table(path, members, configs[0])
    constants = configs[0].replace("/weights/", "/constants/").replace(EXPORTED_TABLE, "_constants_config.json")
    held = (_table(path, members, constants) if constants in members else {}) | tensors
    return Opened("torch.export", tensors, program=Exported(path, members, configs[0], held))


def _table(path: Path, members: Mapping[str, zipfile.ZipInfo], config: str) -> dict[str, pickles.StoredTensor]:
    """Return the tensors that a table in the archive lists, by name."""
    folder = config.rpartition("/")[0] + "/"
    try:
        entries = json.loads(read_member(path, members[config], MAX_CONFIG_BYTES), object_pairs_hook=unique_pairs)["config"]
        described = {str(key): dict(entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"damaged: its table of weights ({e})", remedy="export the network again") from e
    storages = ZipStorages(path, {n[len(folder) :]: info for n, info in members.items() if n.startswith(folder)})
    return {key: _tensor(key, e, storages, members, folder) for key, e in described.items()}


def _tensor(
    key: str, entry: dict[str, Any], storages: ZipStorages, members: Mapping[str, zipfile.ZipInfo], folder: str
) -> pickles.StoredTensor:
    if entry.get("use_pickle"):
        raise CheckpointError(f"weight {key[:200]!r} is stored as a pickle", remedy="save the state_dict with safetensors")
    meta, member = entry.get("tensor_meta"), entry.get("path_name")
    if not isinstance(meta, dict) or f"{folder}{member}" not in members:
        raise CheckpointError(f"damaged: the data of {key[:200]!r} is missing", remedy="export the network again")
    code = meta.get("dtype")
    dtype = _DTYPES.get(code) if isinstance(code, int) else None
    if dtype is None:
        raise CheckpointError(f"tensor {key[:200]!r} has a dtype (number {code!r}) that is not supported")
    storage = pickles.Storage(storages, str(member), dtype, members[f"{folder}{member}"].file_size)
    sizes, strides = (_integers(meta.get(part)) for part in ("sizes", "strides"))
    return pickles.stored_tensor(storage, _integer(meta.get("storage_offset")), sizes, strides)


def _integers(values: object) -> list[object]:
    return [_integer(value) for value in values] if isinstance(values, list) else [None]


def _integer(value: object) -> object:
    return value.get("as_int") if isinstance(value, dict) else None


class Exported:
    """The graph of an archive; calling it runs its nodes, one operator each."""

    def __init__(
        self, path: Path, members: Mapping[str, zipfile.ZipInfo], config: str, tensors: Mapping[str, pickles.StoredTensor]
    ) -> None:
        """Take an archive that has been opened.

        Args:
            path: Of the archive.
            members: Its members by name.
            config: The member that lists the weights.
            tensors: Parameters, buffers and constants by name.
        """
        folder, _, name = config.rpartition("/weights/")
        self._path, self._members, self._tensors = path, members, tensors
        self._model = f"{folder.removesuffix('data')}models/{name.removesuffix(EXPORTED_TABLE)}.json"

    def __call__(self, x_NCHW: Any, run: Operators | None = None) -> Any:
        """Return what the archive computes; raises Unknown when something in it is not known here.

        Args:
            x_NCHW: The images.
            run: What runs its operators.
        """
        run = run or Operators()
        module = self._module()
        values: dict[str, Any] = {}
        images = 0
        for spec in module["signature"]["input_specs"]:
            ((kind, found),) = spec.items()
            name = found["arg"].get("name") or found["arg"]["as_tensor"]["name"]
            if kind == "user_input":
                values[name], images = x_NCHW, images + 1
            elif kind in ("parameter", "buffer", "tensor_constant"):
                stored = self._tensors.get(found[f"{kind}_name"])
                if stored is None:
                    raise Unknown(f"reads {found[f'{kind}_name']}, which is not there")
                values[name] = in_float(stored.read())
                run.name_constant(values[name], str(found[f"{kind}_name"]))
            else:
                raise Unknown(f"reads a {kind}")
        if images != 1:
            raise Unknown(f"takes {images} inputs")
        for node in module["graph"]["nodes"]:
            run.about = _made_by(node)
            _run_node(node, values, run)
        outputs = [
            values[s["user_output"]["arg"]["as_tensor"]["name"]]
            for s in module["signature"]["output_specs"]
            if "user_output" in s
        ]
        return outputs[0] if len(outputs) == 1 else outputs or None

    def _module(self) -> Any:
        if self._model not in self._members:
            raise Unknown("is not there")
        return json.loads(read_member(self._path, self._members[self._model], MAX_CONFIG_BYTES))["graph_module"]

    def input_shape(self) -> tuple[int | None, ...] | None:
        """Return the shape of the images that the graph states, with the batch; None for a size that is open."""
        module = self._module()
        for spec in module["signature"]["input_specs"]:
            if "user_input" in spec:
                meta = module["graph"]["tensor_values"].get(spec["user_input"]["arg"]["as_tensor"]["name"])
                return tuple(size.get("as_int") for size in meta["sizes"]) if meta else None
        return None


def _made_by(node: Mapping[str, Any]) -> str:
    """Return the name of the first tensor that a node makes."""
    ((kind, entry),) = node["outputs"][0].items() if node.get("outputs") else (("", {}),)
    return str((entry[0] if kind == "as_tensors" else entry).get("name", ""))


def _run_node(node: Mapping[str, Any], values: dict[str, Any], run: Operators) -> None:
    library, _, rest = str(node["target"]).partition("torch.ops.aten.")
    name, _, overload = rest.partition(".")
    if library or not rest:
        name, overload = str(node["target"]).removeprefix("_operator."), ""
        if not str(node["target"]).startswith("_operator.") or name not in SCALAR:
            raise Unknown(f"uses {str(node['target'])[:100]}")
    args = [_argument(i["arg"], values) for i in node["inputs"] if i.get("kind", 1) == 1]
    kwargs = {str(i["name"]): _argument(i["arg"], values) for i in node["inputs"] if i.get("kind", 1) != 1}
    result = run.call(name, None if overload in ("", "int") else overload, args, kwargs)
    outputs = node["outputs"]
    if len(outputs) == 1 and "as_tensors" in outputs[0]:
        outputs = [{"as_tensor": entry} for entry in outputs[0]["as_tensors"]]
        results = list(result)
    else:
        results = [result] if len(outputs) == 1 else list(result)
    for output, value in zip(outputs, results, strict=True):
        ((kind, entry),) = output.items()
        values[entry["name"] if kind == "as_tensor" else entry["as_name"]] = value


def _argument(argument: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    ((kind, value),) = argument.items()
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return value
    if kind == "as_tensor":
        return values[value["name"]]
    if kind == "as_tensors":
        return [values[entry["name"]] for entry in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return values[value["as_name"]] if "as_name" in value else next(iter(value.values()))
    if kind in ("as_sym_ints", "as_sym_floats"):
        return [values[e["as_name"]] if "as_name" in e else next(iter(e.values())) for e in value]
    if kind == "as_none":
        return None
    if kind in ("as_scalar_type", "as_memory_format", "as_layout", "as_device"):  # everything is float32 in memory here
        return None
    raise Unknown(f"has an argument of kind {kind[:100]}")
