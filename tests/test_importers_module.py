"""Networks that come as torch modules: what was read computes what the module computes, or is refused by name."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from importer_nets import NETS, Dependent, made
from torch import Tensor, nn

import rescompress as rc
from compress.data import normalise
from compress.importers import module as module_
from compress.importers.proof import difference
from compress.importers.trace import Refused, Trace
from compress.resnet import build_model
from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.operations import BatchNorm, ChannelSelect, Conv


def outputs_of(module: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = module(x_NCHW)
    return list(found.values()) if isinstance(found, dict) else [found]


ENDS: dict[str, Callable[[Tensor], Tensor]] = {"odd pools": lambda y: y.log_softmax(1)}


@pytest.mark.parametrize("name", NETS)
def test_a_module_is_read_as_what_it_computes(name: str) -> None:
    module, shape = made(name)
    checkpoint = rc.from_module(module, torch.zeros(1, *shape))
    assert checkpoint.network.input_shape == shape
    x = torch.randn(
        3, *shape, generator=torch.Generator().manual_seed(7)
    )  # neither the example's batch nor the proof's numbers
    mine = build_model(checkpoint.network, checkpoint.state_dict).outputs(x)
    wanted = outputs_of(module, x)
    assert len(mine) == len(wanted)
    for a, b in zip(mine, wanted, strict=True):
        assert difference(ENDS.get(name, lambda y: y)(a), b) < 1e-5
    assert "proven against the module itself" in str(checkpoint.provenance["notes"])


@pytest.mark.parametrize(
    ("name", "blocks", "classes"),
    [
        ("padded by slices", 1, 5),
        ("chain", 0, 5),
        ("pre-activation", 2, 5),
        ("tutorial", 2, 10),
        ("flatten", 0, 4),
        ("features", 1, None),
    ],
)
def test_blocks_and_classes_are_found(name: str, blocks: int, classes: int | None) -> None:
    module, shape = made(name)
    network = rc.from_module(module, torch.zeros(2, *shape)).network
    assert len(network.blocks) == blocks
    assert network.is_residual == bool(blocks)
    assert network.num_classes == classes


def test_shortcuts_that_pad_are_one_operation_however_they_are_written() -> None:
    for name in ("padded by slices", "padded by a pool"):
        module, shape = made(name)
        (select,) = [
            n.operation
            for n in rc.from_module(module, torch.zeros(1, *shape)).network.nodes
            if n.operation.op == "channel_select"
        ]
        assert isinstance(select, ChannelSelect)
        centred = (-1,) * 4 + tuple(range(8)) + (-1,) * 4
        assert select.channels == (centred if name == "padded by slices" else tuple(range(8)) + (-1,) * 8)
        assert select.stride == (2, 2)


def test_names_are_those_of_the_module() -> None:
    module, shape = made("pre-activation")
    checkpoint = rc.from_module(module, torch.zeros(1, *shape), arch="mine")
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    for key, value in own.items():
        assert torch.equal(checkpoint.state_dict[key], value)
    assert checkpoint.network.arch == "mine"


def test_what_is_no_parameter_is_not_trained() -> None:
    for name, kind in (("blur", Conv), ("frozen", BatchNorm)):
        module, shape = made(name)
        network = rc.from_module(module, torch.zeros(1, *shape)).network
        frozen = [n for n in network.nodes if getattr(n.operation, "frozen", False)]
        assert len(frozen) == 1, (name, kind)
        learnt = sum(p.numel() for p in module.parameters())
        assert sum(layer.params for layer in network.layers) == learnt


def test_several_outputs_keep_their_names() -> None:
    module, shape = made("two heads")
    network = rc.from_module(module, torch.zeros(1, *shape)).network
    assert [o.name for o in network.outputs] == ["policy", "value"]
    assert [o.classes for o in network.outputs] == [True, False]
    assert network.num_classes is None


def test_the_module_is_left_as_it_was() -> None:
    module, shape = made("flatten")
    module.train()
    module[0].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    rc.from_module(module, torch.zeros(1, *shape))
    assert module.training
    assert not module[0].training
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


class Odd(nn.Module):
    """A convolution and a function behind it."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3, padding=1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sorts": (lambda x: x.sort(1).values, r"aten\.sort"),
    "layer norm": (lambda x: nn.functional.layer_norm(x, x.shape[1:]), r"aten\.layer_norm"),
    "cumulates": (lambda x: x.cumsum(1), r"aten\.cumsum"),
    "crops": (lambda x: nn.functional.conv2d(x[:, :, 2:-2, 2:-2], torch.ones(2, 8, 1, 1)), "crops"),
    "mixes images": (lambda x: x.reshape(1, -1, 12, 12).relu().mean((2, 3)), "images of a batch|shape"),
    "positions": (lambda x: x + torch.arange(144.0).view(12, 12), "differs between pixels"),
    "attends": (lambda x: (x.flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(-1), "multiplies two tensors"),
    "transposed": (lambda x: nn.functional.conv_transpose2d(x, torch.ones(8, 4, 2, 2), stride=2), r"conv_transpose2d"),
    "training": (lambda x: nn.functional.batch_norm(x, None, None, training=True), "statistics of its batch"),
    "gates rows": (lambda x: (y := nn.functional.avg_pool2d(x, 5, 1)) * y.mean((2, 3))[:, None, :, None], "multiplies tensors"),
    "squares": (lambda x: x.pow(2), r"aten\.pow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_operation_here_is_named(name: str) -> None:
    function, named = REFUSED[name]
    with pytest.raises(CheckpointError, match=named) as caught:
        rc.from_module(Odd(function), torch.zeros(2, 3, 12, 12))
    assert caught.value.remedy


def test_what_cannot_be_traced_is_told() -> None:
    with pytest.raises(CheckpointError, match="control flow depends") as caught:
        rc.from_module(Dependent(), torch.zeros(1, 3, 8, 8))
    assert "ONNX" in str(caught.value)
    with pytest.raises(CheckpointError, match="does not run on 3x8x8"):
        rc.from_module(made("flatten")[0], torch.zeros(1, 3, 8, 8))
    with pytest.raises(CheckpointError, match="example has shape"):
        rc.from_module(made("flatten")[0], torch.zeros(3, 8, 8))
    with pytest.raises(BadInput):
        rc.from_module(made("chain")[0], torch.zeros(1, 3, 16, 16), preprocess="nonsense")


def test_a_wrong_reading_is_refused_and_the_first_tensor_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape = made("tutorial")
    real = Trace.conv

    def wrong(self: Trace, x: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(self, x, weight * 1.01 if self.name == "2.second" else weight, *args, **kwargs)

    monkeypatch.setattr(Trace, "conv", wrong)
    with pytest.raises(CheckpointError, match=r"first tensor that differs is 'conv2d_2' \(2\.second\)"):
        rc.from_module(module, torch.zeros(1, *shape))


class Chaos(nn.Module):
    """A network whose outputs are the difference of nearly equal large numbers: rounding alone decides them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.two.weight.data = self.one.weight.data * (1 + 1e-5)
        self.bn, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.bn(self.one(x)) * 3e4 - self.other(self.two(x)) * 3e4).mean((2, 3))


def test_where_rounding_decides_double_precision_proves(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.importers import proof

    module = Chaos().eval()
    monkeypatch.setattr(proof, "TOLERANCE", 1e-9)  # what single precision cannot keep, and double precision can
    notes = rc.from_module(module, torch.zeros(1, 3, 16, 16)).provenance["notes"]
    assert any("in double precision" in note for note in notes)


def test_what_is_wrong_is_wrong_in_double_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.importers import trace

    right = trace.Trace.affine

    def wrong(self: trace.Trace, x: trace.Value, scale: torch.Tensor | None, shift: torch.Tensor | None) -> trace.Value:
        return right(self, x, None if scale is None else scale * 1.001, shift)

    monkeypatch.setattr(trace.Trace, "affine", wrong)
    with pytest.raises(CheckpointError, match="computes something else"):
        rc.from_module(Chaos().eval(), torch.zeros(1, 3, 16, 16))


def test_given_images_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape = made("chain")
    seen: list[int] = []
    real = module_.run_module
    monkeypatch.setattr(module_, "run_module", lambda m, x: (seen.append(len(x)), real(m, x))[1])
    checkpoint = rc.from_module(module, torch.zeros(1, *shape), images=torch.rand(5, *shape))
    assert 5 in seen
    assert "and the images given" in str(checkpoint.provenance["notes"])


def test_numbers_that_are_not_finite_are_refused() -> None:
    module, shape = made("chain")
    module[0][1].running_var[2] = -1.0
    with pytest.raises(CheckpointError, match=r"negative variances|off by"):
        rc.from_module(module, torch.zeros(1, *shape))


CODE = """
import torch
from importer_nets_here import made
LOADED = print("this goes nowhere")
def make():
    return made("padded by slices")[0]
def chain():
    return made("chain")[0]
def needs(depth, width=3):
    return make()
def raises():
    raise FileNotFoundError("imagenet/train")
def leaves():
    raise SystemExit(2)
def nothing():
    return 3
def dependent():
    from importer_nets_here import Dependent
    return Dependent()
net = make()
"""


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    source = Path(__file__).with_name("importer_nets.py").read_text()
    (tmp_path / "importer_nets_here.py").write_text(source)
    (tmp_path / "model.py").write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("wrapped", ["plain", "module.", "state_dict/model.", "network", "ema"])
def test_code_and_a_state_dict_make_a_network(beside: Path, wrapped: str) -> None:
    module, shape = made("padded by slices", seed=4)
    state = module.state_dict()
    content: Any = {
        "plain": state,
        "module.": {f"module.{k}": v for k, v in state.items()},
        "state_dict/model.": {
            "state_dict": {f"model.{k}": v for k, v in state.items()} | {"loss.weight": torch.ones(3)},
            "epoch": 3,
        },
        "network": {"network": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        "ema": {"model": state, "ema": {k: v * 0 for k, v in state.items()}},
    }[wrapped]
    torch.save(content, beside / "net.pt")
    checkpoint = rc.load_checkpoint(beside / "net.pt", arch_options={"code": f"{beside}/model.py:make"}, input_shape=shape)
    x = torch.randn(2, *shape)
    assert difference(build_model(checkpoint.network, checkpoint.state_dict)(x), outputs_of(module, x)[0]) < 1e-5


@pytest.mark.parametrize(
    ("callable_", "told"),
    [
        ("needs", "'needs' needs arguments: depth"),
        ("raises", "raises FileNotFoundError: imagenet/train .line 12"),
        ("leaves", "raises SystemExit"),
        ("nothing", "returns a int"),
        ("mkae", "has no 'mkae'.*did you mean 'make'"),
        ("chain", "does not fit the code"),
        ("dependent", "does not fit the code"),
    ],
)
def test_code_that_does_not_do_is_refused(beside: Path, callable_: str, told: str) -> None:
    torch.save(made("padded by slices")[0].state_dict(), beside / "net.pt")
    with pytest.raises(CheckpointError, match=told) as caught:
        rc.load_checkpoint(beside / "net.pt", arch_options={"code": f"{beside}/model.py:{callable_}"})
    assert caught.value.exit_code == 5
    assert caught.value.remedy or callable_ == "nothing"


def test_a_state_that_does_not_fit_names_what_is_missing_too_much_and_different(beside: Path) -> None:
    state = made("padded by slices")[0].state_dict()
    first, second = list(state)[:2]
    broken = {**{k: v for k, v in state.items() if k != second}, first: torch.ones(8, 3, 5, 5), "2.extra": torch.ones(1)}
    torch.save(broken, beside / "net.pt")
    with pytest.raises(CheckpointError) as caught:
        rc.load_checkpoint(beside / "net.pt", arch_options={"code": f"{beside}/model.py:make"})
    told = str(caught.value)
    assert f"1 missing ({second})" in told
    assert "1 too many (2.extra)" in told
    assert re.search(rf"1 of another shape \({re.escape(first)} \(8, 3, 5, 5\) where", told)


def test_without_being_named_no_code_runs(beside: Path) -> None:
    (beside / "model.py").write_text("raise SystemExit('ran')")
    torch.save(made("padded by slices")[0].state_dict(), beside / "net.pt")
    with pytest.raises(CheckpointError, match="no ResNet that is known here"):
        rc.load_checkpoint(beside / "net.pt")


def test_the_command_line_takes_code(beside: Path, rescompress: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    torch.save(made("padded by slices")[0].state_dict(), beside / "net.pt")
    done = rescompress("inspect", "net.pt", "--code", "model.py:make", "--input", "3x16x16", "--json", cwd=beside)
    assert len(json.loads(done.stdout)["blocks"]) == 1
    assert "goes nowhere" not in done.stdout
    done = rescompress("inspect", "net.pt", "--code", "model.py:raises", cwd=beside, code=5)
    assert "imagenet/train" in done.stderr
    done = rescompress("inspect", "net.pt", "--code", "model.py", cwd=beside, code=5)
    assert "FILE:CALLABLE" in done.stderr


def test_steps_know_their_limits() -> None:
    with pytest.raises(Refused):
        Trace((4096, 4096, 4096)).input().move(lambda p: p)


class Scaling(nn.Module):
    """A network that prepares its images itself."""

    def __init__(self, factor: list[float], shift: list[float], flipped: bool = False, learnt: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flipped = flipped
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        for name, value in (("factor", factor), ("shift", shift)):
            tensor = torch.tensor(value).view(1, 3, 1, 1)
            if learnt:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.flip(1) if self.flipped else x) * self.factor + self.shift
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_UNITS = ([1 / s for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)])


@pytest.mark.parametrize("way", ["module", "onnx"])
@pytest.mark.parametrize(
    ("scaling", "unit"),
    [
        (Scaling(*OF_UNITS), 1 / 255),
        (Scaling([2.0] * 3, [-1.0] * 3), 1 / 255),
        (Scaling([1 / 0.3081] * 3, [-0.1307 / 0.3081] * 3), 1 / 255),
        (Scaling([1 / 255] * 3, [0.0] * 3), 1.0),
        (Scaling([1 / 127.5] * 3, [-1.0] * 3), 1.0),
        (Scaling([f / 255 for f in OF_UNITS[0]], OF_UNITS[1], flipped=True), 1.0),
        (Scaling([1.0] * 3, [-103.939, -116.779, -123.68], flipped=True), 1.0),
        (Scaling([1.0] * 3, [-0.5] * 3), None),
        (Scaling([0.3] * 3, [-0.5] * 3), None),
    ],
)
def test_a_network_that_scales_its_images_itself_is_not_given_scaled_ones(
    scaling: Scaling, unit: float | None, way: str, tmp_path: Path
) -> None:
    """What it gets of pixels is what it gets of its author; where that is open, it is said."""
    if way == "module":
        checkpoint = rc.from_module(scaling, torch.zeros(1, 3, 16, 16))
    else:
        torch.onnx.export(scaling.eval(), torch.zeros(1, 3, 16, 16), str(tmp_path / "n.onnx"), dynamo=False, opset_version=17)
        checkpoint = rc.load(tmp_path / "n.onnx")
    p = checkpoint.network.preprocessing
    told = " ".join(map(str, checkpoint.provenance["warnings"]))  # type: ignore[call-overload]
    assert "scales its images itself" in told
    assert p.assumed
    if unit is None:
        assert "state --preprocess" in told
        return
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = scaling(pixels * unit)
        found = build_model(checkpoint.network, checkpoint.state_dict)(normalise(pixels, p))
    assert difference(found, wanted) < 1e-4


def test_what_is_stated_or_learnt_is_not_guessed() -> None:
    stated = rc.from_module(Scaling(*OF_UNITS), torch.zeros(1, 3, 16, 16), preprocess="half")
    assert stated.network.preprocessing.mean == (0.5, 0.5, 0.5)
    assert "itself" not in str(stated.provenance["warnings"])
    plain = rc.from_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)), torch.zeros(1, 3, 8, 8))
    assert plain.network.preprocessing.name == "imagenet"
    assert "itself" not in str(plain.provenance["warnings"])
    learnt = rc.from_module(Scaling([1.1, 0.9, 1.0], [0.05, -0.02, 0.0], learnt=True), torch.zeros(1, 3, 16, 16))
    assert learnt.network.preprocessing.name == "imagenet"
    assert "state --preprocess" in str(learnt.provenance["warnings"])
