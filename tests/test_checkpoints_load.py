"""Loading what people have: the state_dicts of torchvision and of CIFAR code, wrapped in every way, and our own format."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model, tensors_of
from rescompress.core.errors import CheckpointError


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics of its own: fresh ones hide wrong order and wrong epsilon."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.running_var, 0.5),
                (module.bias, -0.2),
                (module.running_mean, -0.2),
            ):
                assert tensor is not None
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator) * 0.4)
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def resnet10(num_classes: int = 1000) -> nn.Module:
    """Return half a ResNet-18, one block a stage, which is made, written and read in half the time."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return randomised(resnet10(10))


def same_logits(path: Path, model: nn.Module, side: int = 64, **options: object) -> None:
    loaded = load_checkpoint(path, **options)  # type: ignore[arg-type]
    x = images(2, 3, side, side)
    with torch.no_grad():
        expected, found = model(x), build_model(loaded.spec, loaded.state_dict)(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.max() - expected.min()))


WRAPPERS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best_prec1": 71.2},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "model_ema": lambda s: {"model_ema": {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(7)}},
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled inside": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "lightning": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(10)},
        "pytorch-lightning_version": "2.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "mmpretrain": lambda s: {
        "state_dict": {("head." if k.startswith("fc.") else "backbone.") + k: v for k, v in s.items()},
        "meta": {},
    },
    "thop": lambda s: s | {"total_ops": torch.zeros(1), "layer1.0.conv1.total_ops": torch.zeros(1)},
    "linear": lambda s: {k.replace("fc.", "linear."): v for k, v in s.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_do_not_matter(wrap, legacy: bool, resnet18: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pth.tar"
    torch.save(wrap(resnet18.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    same_logits(path, resnet18)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_module_is_read_without_running_it(legacy: bool, resnet18: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(resnet18, path, _use_new_zipfile_serialization=not legacy)
    same_logits(path, resnet18)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_timm_module_is_read_without_running_it(legacy: bool, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: its whole modules are not read")
    torch.manual_seed(0)
    model = randomised(timm.create_model("resnet18d", num_classes=10))
    torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    same_logits(tmp_path / "model.pt", model)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_a_torchscript_archive_gives_its_weights(how: str, resnet18: nn.Module, tmp_path: Path) -> None:
    scripted = torch.jit.trace(resnet18, images(1, 3, 64, 64)) if how == "trace" else torch.jit.script(resnet18)
    if how == "freeze":  # constants are folded into its code: no weights with names are left
        torch.jit.save(torch.jit.freeze(scripted), tmp_path / "net.pt")
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "net.pt")
        return
    torch.jit.save(scripted, tmp_path / "net.pt")
    same_logits(tmp_path / "net.pt", resnet18)


@pytest.fixture(scope="module")
def exported(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    torch.export.save(torch.export.export(resnet18, (images(1, 3, 64, 64),)), path)
    return path


def test_an_exported_program_gives_its_weights(exported: Path, resnet18: nn.Module) -> None:
    same_logits(exported, resnet18)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"use_pickle": false', b'"use_pickle": true', "pickle"),
        (b'"dtype": 7', b'"dtype": 9', "dtype"),
        (b'"as_int": 64', b'"as_int": 99', "reaches beyond"),
        (b'"as_int": 64', b'"as_int": "x"', "no size"),
        (b'"weight_3"', b'"weight_x"', "missing"),
        (b'{"config"', b'{"confi"', "table of weights"),
        (b'"sizes": [', b'"sizes": 5, "s": [', "no size"),
    ],
)
def test_a_damaged_exported_program_is_refused(exported: Path, old: bytes, new: bytes, words: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as copy:
        for info in source.infolist():
            data = source.read(info)
            assert not info.filename.endswith("_weights_config.json") or old in data
            copy.writestr(info.filename, data.replace(old, new) if info.filename.endswith(".json") else data)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "bad.pt2")


def test_half_precision_is_told(resnet18: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in resnet18.state_dict().items()}, path)
    loaded = load_checkpoint(path)
    assert all(v.dtype == torch.float32 for k, v in loaded.state_dict.items() if not k.endswith("tracked"))
    assert any("float16" in note for note in loaded.provenance["notes"])


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50d", "resnext50_32x4d", "resnet20_b"])
def test_native_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    spec = zoo.spec(name, num_classes=7)
    torch.manual_seed(0)
    first = Checkpoint(spec, tensors_of(build_model(spec)), None, {"format": "timm", "path": "net.pt", "notes": ["a"]})
    save_checkpoint(first, path)
    second = load_checkpoint(path)
    assert second.spec == first.spec
    assert second.quantization is None
    assert second.provenance["notes"] == first.provenance["notes"]
    assert second.provenance["origin"] == {"format": "timm", "path": "net.pt"}
    assert second.provenance["format"] == "native"
    assert list(second.state_dict) == list(first.state_dict)
    for key, value in first.state_dict.items():
        assert torch.equal(value, second.state_dict[key])


def test_the_zoo_is_what_is_recognised(tmp_path: Path) -> None:
    """Reading a spec off a zoo network's tensors gives that spec again, name and all."""
    for name in ("resnet20", "resnet32_b", "resnet18", "resnet34", "resnet26", "resnet50", "resnet18_cifar"):
        spec = zoo.spec(name)
        torch.save(build_model(spec).state_dict(), tmp_path / "net.pt")
        assert load_checkpoint(tmp_path / "net.pt").spec == spec


def test_a_pickle_with_code_is_refused_by_name(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (print, ("ran",))

    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {}, "extra": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"builtins\.print"):
        load_checkpoint(path)


@pytest.mark.parametrize("file", ["resnet20_cifar10.pt", "resnet32_cifar10.th"])
def test_real_cifar_checkpoints(file: str, shared: Path) -> None:
    loaded = load_checkpoint(shared / "data" / "checkpoints" / file)
    assert loaded.spec == zoo.spec(file.split("_")[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    first, second = (tensors_of(build_model(zoo.spec("resnet20"))) for _ in range(2))
    return first, second


def prefixed(prefix: str, state: dict[str, Tensor], *, head: bool = True) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items() if head or not k.startswith("fc.")}


def test_which_network_of_several(two, tmp_path: Path) -> None:
    """Plain weights go before averaged ones, students before teachers; options take the other; the rest is told."""
    raw, averaged = two
    dino_head = {"module.head.mlp.0.weight": torch.ones(64, 64), "module.head.mlp.0.bias": torch.ones(64)}
    dino_head |= {"module.head.last_layer.weight_g": torch.ones(9, 1), "module.head.last_layer.weight_v": torch.ones(9, 64)}
    cases: list[tuple[object, dict[str, str], Tensor, bool]] = [
        ({"model": raw, "model_ema": averaged}, {}, raw["conv1.weight"], True),
        ({"model": raw, "model_ema": averaged}, {"weights": "ema"}, averaged["conv1.weight"], True),
        ({"state_dict_ema": averaged, "state_dict": raw}, {}, raw["conv1.weight"], True),
        ({"state_dict_ema": averaged, "state_dict": raw}, {"root": "state_dict_ema"}, averaged["conv1.weight"], True),
        (prefixed("encoder_k.", averaged) | prefixed("encoder_q.", raw), {}, raw["conv1.weight"], True),
        (
            {"teacher": prefixed("backbone.", averaged), "student": prefixed("module.backbone.", raw, head=False) | dino_head},
            {},
            raw["conv1.weight"],
            False,
        ),
        ((raw, {"epoch": 3}), {}, raw["conv1.weight"], True),
    ]
    for content, options, expected, has_head in cases:
        torch.save(content, tmp_path / "net.pt")
        loaded = load_checkpoint(tmp_path / "net.pt", arch_options=options)
        assert torch.equal(loaded.state_dict["conv1.weight"], expected)
        assert (loaded.spec.head is not None) == has_head
        told = any("other networks" in note for note in loaded.provenance["notes"])
        assert told == (not isinstance(content, tuple))


def test_what_was_left_out_is_told(two, tmp_path: Path) -> None:
    raw, _ = two
    torch.save(
        raw | {"fc_aux.weight": torch.ones(4, 64), "fc_aux.bias": torch.ones(4), "queue": torch.ones(2)}, tmp_path / "n.pt"
    )
    loaded = load_checkpoint(tmp_path / "n.pt")
    assert loaded.spec.head.num_classes == 10  # type: ignore[union-attr]
    text = " ".join(loaded.provenance["notes"])  # type: ignore[arg-type]
    assert "fc_aux" in text
    assert "queue" in text


def children(*head: nn.Module) -> nn.Module:
    """A ResNet-18 as a Sequential of its children, and a head behind its pooling."""
    torch.manual_seed(1)
    return randomised(nn.Sequential(*list(resnet10().children())[:-1], nn.Flatten(), *head))


@pytest.mark.parametrize(
    "head",
    [
        (nn.Linear(512, 10),),
        (nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
        (nn.BatchNorm1d(512), nn.Linear(512, 10)),
        (nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)),
        (nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),),
    ],
)
def test_a_head_behind_the_children_of_a_network_is_read_whole(head: tuple[nn.Module, ...], tmp_path: Path) -> None:
    model = children(*head)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    same_logits(tmp_path / "net.pt", model)


class Classified(nn.Module):
    """A backbone and one linear layer, as people write it."""

    def __init__(self, name: str, norm: str | None = None) -> None:
        super().__init__()
        self.backbone = resnet10()
        self.backbone.fc = nn.Identity()
        self.norm = norm
        if norm is not None:
            self.add_module(norm, nn.BatchNorm1d(512))
        self.name = name
        self.add_module(name, nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        features = features if self.norm is None else self.get_submodule(self.norm)(features)
        return self.get_submodule(self.name)(features)


@pytest.mark.parametrize("name", ["clf", "new_fc", "final", "readout", "top"])
def test_a_classifier_may_have_any_name(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = randomised(Classified(name))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    same_logits(tmp_path / "net.pt", model)
    notes = load_checkpoint(tmp_path / "net.pt").provenance["notes"]
    assert any(name in note for note in notes)


@pytest.mark.parametrize("name", ["clf", "classifier"])
def test_a_batch_norm_in_front_of_the_classifier_is_not_left_out(name: str, tmp_path: Path) -> None:
    torch.save(Classified(name, "bottleneck").state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="bottleneck"):
        load_checkpoint(tmp_path / "net.pt")


def test_a_missing_classifier_is_a_warning(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    for key in ("fc.weight", "fc.bias"):
        del state[key]
    state["a.weight"], state["b.weight"] = torch.zeros(512, 512), torch.zeros(512, 10)
    torch.save(state, tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt")
    assert loaded.spec.head is None or not loaded.spec.head.num_classes
    assert any("no classifier" in text for text in loaded.provenance["warnings"])
    assert any("a.weight" in text for text in loaded.provenance["warnings"])


def test_a_regnet_with_the_keys_of_a_resnet_is_refused(tmp_path: Path) -> None:
    state = {"regnet.embedder.embedder.convolution.weight": torch.zeros(32, 3, 3, 3)}
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"regnet.embedder.embedder.normalization.{part}"] = torch.ones(32)
    block = "regnet.encoder.stages.0.layers.0."
    for key, shape in (("layer.0", (64, 32, 1, 1)), ("layer.1", (64, 16, 3, 3)), ("layer.2", (64, 64, 1, 1))):
        state[f"{block}{key}.convolution.weight"] = torch.zeros(shape)
    torch.save(state, tmp_path / "regnet.pt")
    with pytest.raises(CheckpointError, match="RegNet"):
        load_checkpoint(tmp_path / "regnet.pt")


class OwnConv(nn.Conv2d):
    """May compute anything."""


class ConvWithPool(nn.Module):
    """A max pool under another name behind a 3x3 stem, where a state_dict would be read as a network without one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        usual = torchvision.models.resnet18(num_classes=10)
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), usual.bn1
        self.pool = nn.MaxPool2d(size, 2, size // 2)
        self.layer1, self.layer2, self.layer3, self.layer4, self.fc = (
            usual.layer1, usual.layer2, usual.layer3, usual.layer4, usual.fc)  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def _with_epsilon(model: nn.Module, kind: type[nn.Module], eps: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, kind):
            module.eps = eps  # type: ignore[assignment]
    return model


def _put(name: str, made: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.set_submodule(name, made())
        return model

    return change


def _head(*layers: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return _put("fc", lambda: nn.Sequential(nn.Linear(512, 16), *layers, nn.Linear(16, 10)))


def _frozen(model: nn.Module) -> nn.Module:
    frozen = torchvision.ops.FrozenBatchNorm2d(64, eps=0.1)
    frozen.load_state_dict({k: v for k, v in model.get_submodule("bn1").state_dict().items() if k != "num_batches_tracked"})
    model.bn1 = frozen
    return _with_epsilon(model, nn.BatchNorm2d, 0.1)


USED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "3x3 stem with stride 2": _put("conv1", lambda: nn.Conv2d(3, 64, 3, 2, 1, bias=False)),
    "no max pool": _put("maxpool", nn.Identity),
    "an empty max pool": _put("maxpool", nn.Sequential),
    "a max pool of another name": lambda model: ConvWithPool(3),
    "same padding": _put("layer1.0.conv1", lambda: nn.Conv2d(64, 64, 3, padding="same", bias=False)),
    "the mean of a window as large as the map": _put("avgpool", lambda: nn.AvgPool2d(2)),
    "epsilon": lambda model: _with_epsilon(model, nn.BatchNorm2d, 1e-3),
    "epsilon of a frozen BatchNorm": _frozen,
    "epsilon of the head": lambda model: _with_epsilon(_head(nn.BatchNorm1d(16), nn.ReLU())(model), nn.BatchNorm1d, 0.5),
}
"""Changes that no tensor shows, and that what is read takes up."""

REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "dilation": (
        lambda model: torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]), "dilation 2"),
    "activation": (_put("layer2.0.relu", nn.LeakyReLU), "LeakyReLU"),
    "no activation": (_put("layer2.0.relu", nn.Identity), "layer2.0.relu is Identity"),
    "sigmoid in the head": (_head(nn.Sigmoid()), "Sigmoid"),
    "nothing but dropout in the head": (_head(nn.Dropout(0.2)), "no ReLU between fc.0 and fc.2"),
    "rounding up": (_put("maxpool", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)), "pooling maxpool"),
    "a small max pool": (lambda model: ConvWithPool(2), "pooling pool"),
    "a mean as max pool": (_put("maxpool", lambda: nn.AvgPool2d(3, 2, 1)), "pooling maxpool averages"),
    "a global max pool": (_put("avgpool", lambda: nn.AdaptiveMaxPool2d(1)), "takes maxima"),
    "several pixels": (_put("avgpool", lambda: nn.AdaptiveAvgPool2d(2)), "leaves 2 pixels"),
    "padding": (_put("conv1", lambda: nn.Conv2d(3, 64, 7, 2, 3, bias=False, padding_mode="reflect")), "reflect"),
    "stride along one side": (_put("conv1", lambda: nn.Conv2d(3, 64, 7, (2, 1), 3, bias=False)), "along height"),
    "a class of its own": (_put("conv1", lambda: OwnConv(3, 64, 7, 2, 3, bias=False)), "class of its own"),
}  # fmt: skip
"""Changes that no tensor shows, and that cannot be had."""


def changed(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a whole ResNet that is not the usual one in what no tensor shows."""
    torch.manual_seed(3)
    return randomised(change(resnet10(10))).eval()


@pytest.mark.parametrize("what", USED)
def test_what_a_whole_module_says_of_itself_counts(what: str, tmp_path: Path) -> None:
    model = changed(USED[what])
    torch.save(model, tmp_path / "whole.pt")
    same_logits(tmp_path / "whole.pt", model, input_shape=(3, 64, 64))


def test_a_sigmoid_behind_the_head_leaves_its_order(tmp_path: Path) -> None:
    model = changed(_put("fc", lambda: nn.Sequential(nn.Linear(512, 10), nn.Sigmoid())))
    torch.save(model, tmp_path / "whole.pt")
    model.get_submodule("fc")[1] = nn.Identity()  # type: ignore[index, operator]
    same_logits(tmp_path / "whole.pt", model)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_whole_module_says_and_cannot_be_had_is_refused(what: str, tmp_path: Path) -> None:
    change, words = REFUSED[what]
    torch.save(changed(change), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "whole.pt", input_shape=(3, 64, 64))


NAMES = tuple(["zitrone", "quitte", "kiwi", "birne", "ananas", "banane", "apfel", "traube", "feige", "dattel"])
IN_FILE: dict[str, dict[str, object]] = {
    "class_to_idx": {"class_to_idx": {name: i for i, name in enumerate(NAMES)}},
    "idx_to_class": {"idx_to_class": dict(enumerate(NAMES))},
    "id2label of text": {"config": {"id2label": {str(i): name for i, name in enumerate(NAMES)}}},
    "classes": {"classes": list(NAMES)},
    "mmengine": {"meta": {"dataset_meta": {"classes": NAMES}}},
    "the first that fits": {"class_to_idx": {"a": 0}, "class_names": list(NAMES)},
}


@pytest.mark.parametrize("where", IN_FILE)
def test_names_of_classes_beside_the_weights_are_read(where: str, resnet18: nn.Module, tmp_path: Path) -> None:
    torch.save({"model_state_dict": resnet18.state_dict(), **IN_FILE[where]}, tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt")
    assert loaded.spec.labels == NAMES
    assert not loaded.provenance["warnings"]


@pytest.mark.parametrize(
    "odd",
    [
        {"classes": ["one", "two"]},
        {"classes": [*NAMES[:9], NAMES[0]]},
        {"classes": list(range(10))},
        {"class_to_idx": {name: i + 1 for i, name in enumerate(NAMES)}},
        {"class_to_idx": dict.fromkeys(NAMES, None)},
    ],
    ids=["too few", "one twice", "numbers", "from one", "nothing"],
)
def test_names_of_classes_that_do_not_fit_are_told(odd: dict[str, object], resnet18: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": resnet18.state_dict(), **odd}, tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt")
    assert loaded.spec.labels is None
    assert any(f"its {next(iter(odd))} holds" in text for text in loaded.provenance["warnings"])


def test_a_whole_network_states_the_names_of_its_classes(tmp_path: Path) -> None:
    model = changed(USED["nothing"])
    model.class_to_idx = {name: i for i, name in enumerate(NAMES)}  # type: ignore[assignment]
    torch.save(model, tmp_path / "whole.pt")
    assert load_checkpoint(tmp_path / "whole.pt").spec.labels == NAMES


def test_a_closing_log_softmax_that_is_left_out_is_told(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = torchvision.models.resnet18(num_classes=4).eval()
    model.fc = torch.nn.Sequential(torch.nn.Linear(512, 4), torch.nn.LogSoftmax(1))
    torch.save(model, tmp_path / "whole.pt")
    loaded = load_checkpoint(tmp_path / "whole.pt", input_shape=(3, 64, 64))
    assert [w for w in loaded.provenance["warnings"] if "LogSoftmax" in w] == [
        "its closing LogSoftmax is left out: the outputs are logits"
    ]


def test_the_stride_of_an_unusual_stem_is_told(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = torchvision.models.resnet18(num_classes=4)
    model.conv1 = torch.nn.Conv2d(3, 64, 5, 1, 2, bias=False)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    told = load_checkpoint(tmp_path / "net.pt", input_shape=(3, 64, 64)).provenance["warnings"]
    assert any("5x5 stem is taken to have stride 2" in n for n in told)
