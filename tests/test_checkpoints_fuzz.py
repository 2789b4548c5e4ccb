"""Mutated checkpoints: each ends in the correct network, or in our own error; never a traceback, a hang or much memory."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model, tensors_of
from rescompress.core.errors import CheckpointError

State = dict[str, Tensor]
CASES_SLOW, CASES_FAST = 2400, 45
SECONDS_PER_CASE = 20
MEMORY_LIMIT = 2 * 2**30


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Return the checkpoints that are mutated: one small network in every container."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    spec = zoo.spec("resnet20")
    model = build_model(spec)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.data.normal_(0, 0.2)
            module.running_var.data.uniform_(0.5, 1.5)
    state = tensors_of(model)
    paths = {name: folder / f"{name}{suffix}" for name, suffix in SUFFIXES.items()}
    torch.save(state, paths["zip"])
    torch.save(state, paths["legacy"], _use_new_zipfile_serialization=False)
    save_file(state, paths["safetensors"])
    save_checkpoint(Checkpoint(spec, state, None, {}), paths["native"])
    torch.save(model, paths["module"])
    _hdf5(state, paths["hdf5"])
    return paths


SUFFIXES = {
    "zip": ".pt",
    "legacy": ".th",
    "safetensors": ".safetensors",
    "native": ".safetensors",
    "module": ".pth",
    "hdf5": ".h5",
}


def _hdf5(state: State, path: Path) -> None:
    """Write a narrow Keras ResNet-50 with eight channels."""
    h5py = pytest.importorskip("h5py")
    spec = zoo.spec("keras_resnet50", num_classes=3)
    generator = torch.Generator().manual_seed(0)
    with h5py.File(path, "w") as f:

        def conv(name: str, out: int, before: int, kernel: int) -> None:
            group = f.require_group(f"{name}_conv/{name}_conv")
            group["kernel:0"] = torch.randn(kernel, kernel, before, out, generator=generator).numpy()
            group["bias:0"] = torch.randn(out, generator=generator).numpy()
            bn = f.require_group(f"{name}_bn/{name}_bn")
            for part in ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"):
                bn[part] = torch.rand(out, generator=generator).numpy()

        conv("conv1", 8, 3, 7)
        for block in spec.blocks:
            stage, index = block.name.removeprefix("layer").split(".")
            name = f"conv{int(stage) + 1}_block{int(index) + 1}"
            for i, kernel in ((1, 1), (2, 3), (3, 1)):
                conv(f"{name}_{i}", 8, 8, kernel)
            if block.shortcut == "projection":
                conv(f"{name}_0", 8, 8, 1)
        group = f.require_group("predictions/predictions")
        group["kernel:0"] = torch.randn(8, 3, generator=generator).numpy()
        group["bias:0"] = torch.randn(3, generator=generator).numpy()


@contextlib.contextmanager
def limits(what: str) -> Iterator[None]:
    def late(signum: int, frame: object) -> None:
        raise TimeoutError(f"{what}: hangs")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # other tests ran in this process
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * 1024 < MEMORY_LIMIT, f"{what}: too much memory"


# Damage to bytes: the file may still load, and then holds what an independent reader finds in it.


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.randint(1, 16)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_structure(data: bytearray, rng: random.Random) -> bytearray:
    """Flip bits where headers, pickles and directories lie."""
    edge = min(len(data) // 2, 6000)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(edge) if rng.random() < 0.6 else len(data) - 1 - rng.randrange(edge)
        data[at] = rng.randrange(256)
    return data


def huge_header(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(min(len(data) - 8, 3000)) if rng.random() < 0.5 else 0
    data[at : at + 8] = struct.pack("<Q", rng.choice([2**31, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8]))
    return data


def splice(data: bytearray, rng: random.Random) -> bytearray:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:a] + bytes(min(b - a, 5000)) + data[b:]


def append(data: bytearray, rng: random.Random) -> bytearray:
    return data + bytes(rng.randrange(256) for _ in range(rng.randint(1, 200)))


BYTES = [truncate, flip, flip_structure, flip_structure, huge_header, splice, append]

# Damage to the state_dict: must be refused.


def _victim(state: State, rng: random.Random) -> str:
    return rng.choice([k for k in state if not k.endswith("num_batches_tracked")])


def missing(state: State, rng: random.Random) -> None:
    del state[_victim(state, rng)]


def integers(state: State, rng: random.Random) -> None:
    key = _victim(state, rng)
    state[key] = (state[key] * 100).to(rng.choice([torch.int64, torch.int8, torch.uint8, torch.bool]))


def not_finite(state: State, rng: random.Random) -> None:
    key = _victim(state, rng)
    state[key] = state[key].clone()
    state[key].view(-1)[rng.randrange(state[key].numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])


def cut(state: State, rng: random.Random) -> None:
    key = rng.choice([k for k in state if state[k].dim() and state[k].shape[0] > 1 and not k.startswith("fc.")])
    state[key] = state[key][:-1].clone()


def foreign_part(state: State, rng: random.Random) -> None:
    block = f"layer{rng.randint(1, 3)}.{rng.randint(0, 2)}"
    state[f"{block}.{rng.choice(['se.fc1', 'attn.qkv', 'conv3', 'bn9', 'gate'])}.weight"] = torch.ones(4, 4, 1, 1)


def renamed(state: State, rng: random.Random) -> None:
    key = _victim(state, rng)
    state[key.replace("weight", "wieght").replace("bias", "bais").replace("running", "runing")] = state.pop(key)


def stray(state: State, rng: random.Random) -> None:
    state[rng.choice(["extra", "meta.scale", "temperature"])] = torch.rand(rng.choice([(1,), (3,), (2, 2), ()]))


DAMAGE = [missing, integers, not_finite, cut, foreign_part, renamed, stray]

# What does no harm: must load, with identical logits.


def extra_keys(state: State, rng: random.Random) -> object:
    for name in rng.sample(["queue", "queue_ptr", "loss.weight", "total_ops", "layer1.0.total_params", "n_averaged"], 3):
        state[name] = torch.rand(rng.choice([(1,), (3,), (2, 2), ()]))
    return state


def wrapper(state: State, rng: random.Random) -> object:
    key = rng.choice(["state_dict", "model", "model_state_dict", "net", "network", "weights", "model_ema", "ema"])
    return {key: state, "epoch": rng.randrange(300), "optimizer": {"state": {0: {"exp_avg": torch.zeros(16, 3, 3, 3)}}}}


def prefix(state: State, rng: random.Random) -> object:
    words = [rng.choice(["module", "model", "_orig_mod", "backbone", "net", "encoder"]) for _ in range(rng.randint(1, 3))]
    return {".".join([*words, key]): value for key, value in state.items()}


def half(state: State, rng: random.Random) -> object:
    dtype = rng.choice([torch.float16, torch.bfloat16])
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def double(state: State, rng: random.Random) -> object:
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


def shuffled(state: State, rng: random.Random) -> object:
    keys = list(state)
    rng.shuffle(keys)
    return {k: state[k] for k in keys}


def no_counters(state: State, rng: random.Random) -> object:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def views(state: State, rng: random.Random) -> object:
    flat = torch.cat([v.reshape(-1) for v in state.values() if v.is_floating_point()])
    at, found = 0, {}
    for key, value in state.items():
        if value.is_floating_point():
            found[key] = flat[at : at + value.numel()].view(value.shape)
            at += value.numel()
    return found


BENIGN: list[Callable[[State, random.Random], object]] = [
    extra_keys, wrapper, prefix, half, double, shuffled, no_counters, views
]  # fmt: skip


def logits(state: State) -> Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return build_model(zoo.spec("resnet20"), state)(x)


def independent(path: Path, container: str) -> State | None:
    """Return the tensors as torch, safetensors or h5py read them; None where they cannot."""
    try:
        if container in ("zip", "legacy"):
            found = torch.load(path, weights_only=True, map_location="cpu")
        elif container in ("safetensors", "native"):
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            return None
    except Exception:
        return None
    return found if isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values()) else None


def one_case(number: int, originals: dict[str, Path], folder: Path) -> str:
    """Run one case and return how it ended."""
    rng = random.Random(number)
    state = torch.load(originals["zip"], weights_only=True)
    group = number % 3
    if group == 0:
        kind = rng.choice(BENIGN)
        path = folder / "benign.pt"
        mutated = kind(dict(state), rng)
        torch.save(mutated, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        with limits(f"case {number} ({kind.__name__})"):
            loaded = load_checkpoint(path)
        expected = state
        if kind is half:
            assert isinstance(mutated, dict)
            expected = {k: v.float() if v.is_floating_point() else v for k, v in mutated.items()}
        assert torch.equal(logits(dict(loaded.state_dict)), logits(expected)), f"case {number} ({kind.__name__})"
        return f"benign {kind.__name__}"
    if group == 1:
        damage = rng.choice(DAMAGE)
        path = folder / "damaged.pt"
        broken = dict(state)
        damage(broken, rng)
        if rng.random() < 0.5:
            torch.save({"state_dict": {f"module.{k}": v for k, v in broken.items()}}, path)
        else:
            torch.save(broken, path)
        with limits(f"case {number} ({damage.__name__})"), pytest.raises(CheckpointError) as e:
            load_checkpoint(path)
        assert e.value.exit_code == 5
        return f"refused {damage.__name__}"
    container = rng.choice(list(originals))
    change = rng.choice(BYTES)
    path = folder / f"bytes{SUFFIXES[container]}"
    path.write_bytes(bytes(change(bytearray(originals[container].read_bytes()), rng)))
    with limits(f"case {number} ({change.__name__} of {container})"):
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:  # exit code 5
            return f"refused {change.__name__} of {container}"
    seen = independent(path, container)
    if seen is not None:
        seen = {k.removeprefix("module."): v for k, v in seen.items()}
        for key, value in loaded.state_dict.items():
            if key in seen and seen[key].shape == value.shape:
                assert torch.equal(value, seen[key].to(value.dtype)), f"case {number}: {key} is not what the file holds"
    if container == "zip" and zipfile.is_zipfile(path):
        assert all(torch.equal(loaded.state_dict[k], v) for k, v in state.items() if k in loaded.state_dict), f"case {number}"
    return f"loaded {change.__name__} of {container}"


def run_cases(numbers: range, originals: dict[str, Path], folder: Path) -> dict[str, int]:
    ends: dict[str, int] = {}
    for number in numbers:
        end = one_case(number, originals, folder)
        ends[end] = ends.get(end, 0) + 1
    return ends


def test_mutations(originals: dict[str, Path], tmp_path: Path) -> None:
    ends = run_cases(range(CASES_FAST), originals, tmp_path)
    assert sum(n for end, n in ends.items() if end.startswith("benign")) == CASES_FAST // 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_mutations(part: int, originals: dict[str, Path], tmp_path: Path) -> None:
    size = CASES_SLOW // 4
    ends = run_cases(range(part * size, (part + 1) * size), originals, tmp_path)
    assert sum(ends.values()) == size
    for kind in [f"benign {b.__name__}" for b in BENIGN] + [f"refused {d.__name__}" for d in DAMAGE]:
        assert ends.get(kind), f"no case of {kind}"
    assert any(end.startswith("loaded flip") for end in ends), "no damage was ever survived: the oracle saw nothing"
