"""The training loop: it learns, it resumes to the bit, and its losses are what they say."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.data import Inputs, MemoryStore, Split
from compress.data.augment import shifted
from compress.data.loader import Batches
from compress.losses import distillation_loss, feature_loss, label_loss, shared_features
from compress.pixels import normalise
from compress.processes import Together
from compress.resnet import ResNet, build_model
from compress.train import TrainState, _accelerator, _optimizer, _step, arranged, train
from rescompress.core.errors import BadInput, DataError
from rescompress.core.manifest import Manifest
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv
from rescompress.runs.reporter import Silent
from rescompress.runs.stage import Context
from rescompress.runs.stages.network import train_network

ALONE = Together()
SPEC = ModelSpec(
    input_shape=(3, 8, 8),
    stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
    head=Head(num_classes=2, dropout=0.2),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=None),
)


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 64)
    x = rng.integers(0, 120, (64, 8, 8, 3), dtype=np.uint8) + (y * 100).astype(np.uint8)[:, None, None, None]
    return Split(MemoryStore(x), y, ("dark", "bright"), Inputs.of(SPEC).preprocessing, "test")


def fresh() -> ResNet:
    torch.manual_seed(0)
    return build_model(SPEC)


def settings(**changed: object) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "batch_size": 16, "device": "cpu", "lr": 0.05} | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "gpus", "processes", "current", "cpu"),
    [
        ("auto", 0, 1, [], True),
        ("auto", 2, 1, [], False),
        ("cpu", 2, 1, [], True),
        ("cuda", 2, 1, [], False),
        ("cuda:1", 2, 1, ["cuda:1"], False),
        ("cuda:1", 2, 2, [], False),
        ("mps", 0, 1, [], False),
    ],
)
def test_training_takes_the_device_that_evaluation_takes(
    monkeypatch: pytest.MonkeyPatch, word: str, gpus: int, processes: int, current: list[str], cpu: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # which Accelerate prefers to anything else
    monkeypatch.setattr(accelerate, "Accelerator", lambda *, cpu: cpu)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert _accelerator(word) is cpu  # type: ignore[comparison-overlap]
    assert asked == current


@pytest.mark.parametrize("word", ["cuda", "cuda:2", "tpu"])
def test_a_device_that_is_not_there_does_not_train(split: Split, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if ":" in word else 0)
    with pytest.raises((BadInput, ValueError), match=word):
        train(fresh(), split, settings(device=word))


def test_it_learns_and_logs_each_epoch(split: Split) -> None:
    model = fresh()
    log = train(model, split, settings(epochs=8))
    assert [e["epoch"] for e in log.epochs] == list(range(1, 9))
    assert log.epochs[-1]["loss"] < 0.5 * log.epochs[0]["loss"]
    x, y = next(split.batches(64))
    assert not model.training
    assert (model(x).argmax(1) == y).float().mean() > 0.9


class _Killed(Exception):
    pass


def killed_at(step: int) -> Callable[[TrainState], None]:
    def kill(state: TrainState) -> None:
        if state.step == step:
            raise _Killed

    return kill


@pytest.mark.parametrize("stop", [1, 5, 8, 11])
def test_killed_and_resumed_ends_with_the_same_bits(split: Split, tmp_path: Path, stop: int) -> None:
    whole = fresh()
    expected = train(whole, split, settings(), teacher=fresh())
    resume = tmp_path / "state.pt"
    with pytest.raises(_Killed):
        train(fresh(), split, settings(), teacher=fresh(), resume_file=resume, save_every_s=0.0, progress=killed_at(stop + 1))
    second = fresh()
    log = train(second, split, settings(), teacher=fresh(), resume_file=resume)
    assert log.resumed_at == stop
    assert log.epochs == expected.epochs
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :]


class _Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, ("ran",)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    **{f"a bit at {part}/7": lambda content, part=part: _flip(content, len(content) * part // 7) for part in range(7)},
    "a bit at the end": lambda content: _flip(content, len(content) - 1),
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "more": lambda content: content + b" ",
    "of an earlier version": lambda content: content[content.index(b"PK") :],
    "hostile": lambda content: pickle.dumps(_Hostile(), 2),
    "hostile and signed": lambda content: (
        content[: content.index(b"\n") + 1] + hashlib.sha256(pickle.dumps(_Hostile(), 2)).digest() + pickle.dumps(_Hostile(), 2)
    ),
}


@pytest.fixture
def stopped(split: Split, tmp_path: Path) -> bytes:
    """The state that a training left which was stopped in its fourth step."""
    resume = tmp_path / "state.pt"
    with pytest.raises(_Killed):
        train(fresh(), split, settings(epochs=2), resume_file=resume, save_every_s=0.0, progress=killed_at(4))
    return resume.read_bytes()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_told_and_training_starts_again(
    split: Split, stopped: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    resume = tmp_path / "state.pt"
    resume.write_bytes(DAMAGE[kind](stopped))
    expected, network, notes = fresh(), fresh(), list[str]()
    train(expected, split, settings(epochs=2))
    assert train(network, split, settings(epochs=2), resume_file=resume, note=notes.append).resumed_at == 0
    assert len(notes) == 1
    assert "training starts again" in notes[0]
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), expected.state_dict().values(), strict=True))
    assert not (tmp_path / "ran").exists()


class _InOrder(Silent):
    """A reporter that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        self.heard.append("step")


@pytest.mark.parametrize("main", [True, False])
def test_what_became_of_a_saved_state_is_told_before_the_first_step(split: Split, tmp_path: Path, main: bool) -> None:
    """Not at the end of a training that may take hours; it stands in the details, too."""
    reporter = _InOrder()
    context = Context(tmp_path, Manifest(), reporter, main=main)
    context.resume_file("finetune").mkdir(parents=True)
    details, _ = train_network(context, "finetune", fresh(), split, settings(epochs=1), None)
    told = [text for text in reporter.heard if "training starts again" in text]
    assert reporter.heard[: len(told) + 1] == [*told, "step"]
    assert told == (details.notes if main else [])
    assert len(details.notes) == 1


def test_a_state_that_is_no_file_is_not_waited_for(split: Split, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        notes: list[str] = []
        train(fresh(), split, settings(epochs=2), resume_file=path, note=notes.append)
        assert "training starts again" in notes[0]


def test_a_training_that_goes_on_with_other_threads_says_so(
    split: Split, stopped: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = tmp_path / "state.pt"
    resume.write_bytes(stopped)
    notes: list[str] = []
    assert train(fresh(), split, settings(epochs=2), resume_file=resume, note=notes.append).resumed_at == 3
    assert notes == []
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    with pytest.raises(_Killed):
        train(
            fresh(), split, settings(epochs=2), resume_file=resume, note=notes.append, save_every_s=0.0, progress=killed_at(5)
        )
    assert notes == [
        f"training goes on with {before + 1} threads after {before}: the sums, and so the bits, are those of neither"
    ]
    monkeypatch.undo()
    assert train(fresh(), split, settings(epochs=2), resume_file=resume, note=notes.append).threads == [before, before + 1]
    assert f"after {before} and {before + 1}" in notes[1]


def test_a_state_of_other_settings_is_not_taken_up(split: Split, tmp_path: Path) -> None:
    resume = tmp_path / "state.pt"
    with pytest.raises(_Killed):
        train(fresh(), split, settings(), resume_file=resume, save_every_s=0.0, progress=killed_at(4))
    assert resume.is_file()
    assert train(fresh(), split, settings(lr=0.01), resume_file=resume).resumed_at == 0


def test_a_state_of_other_preprocessing_is_not_taken_up(split: Split, tmp_path: Path) -> None:
    resume = tmp_path / "state.pt"
    other = dataclasses.replace(split, preprocessing=split.preprocessing.model_copy(update={"std": (0.7, 0.7, 0.7)}))
    for changed in (other, dataclasses.replace(split, flips=not split.flips)):
        with pytest.raises(_Killed):
            train(fresh(), split, settings(), resume_file=resume, save_every_s=0.0, progress=killed_at(4))
        assert train(fresh(), changed, settings(), resume_file=resume).resumed_at == 0


def test_a_state_of_another_network_or_teacher_is_not_taken_up(split: Split, tmp_path: Path) -> None:
    resume = tmp_path / "state.pt"
    with pytest.raises(_Killed):
        train(fresh(), split, settings(), teacher=fresh(), resume_file=resume, save_every_s=0.0, progress=killed_at(4))
    kept = resume.read_bytes()
    other, wider = fresh(), build_model(SPEC.replace_blocks({"layer1.0": SPEC.blocks[0].model_copy(update={"widths": (6, 4)})}))
    other.get_submodule("bn1").running_mean.add_(1e-3)
    for network, teacher in ((other, fresh()), (wider, fresh()), (fresh(), other)):
        resume.write_bytes(kept)
        expected = copy.deepcopy(network)
        train(expected, split, settings(), teacher=teacher)
        assert train(network, split, settings(), teacher=teacher, resume_file=resume).resumed_at == 0
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), expected.state_dict().values(), strict=True)
        )
    resume.write_bytes(kept)
    assert train(fresh(), split, settings(), teacher=fresh(), resume_file=resume).resumed_at > 0


def test_a_state_that_trained_other_parameters_is_not_taken_up(split: Split, tmp_path: Path) -> None:
    """Learnable scales of quantizers are the same tensors as fixed ones, with a gradient or without."""
    partly, resume = fresh(), tmp_path / "state.pt"
    partly.get_submodule("conv1").requires_grad_(False)
    with pytest.raises(_Killed):
        train(partly, split, settings(), resume_file=resume, save_every_s=0.0, progress=killed_at(4))
    assert resume.is_file()
    assert train(fresh(), split, settings(), resume_file=resume).resumed_at == 0


def test_frozen_batch_norm_keeps_its_statistics(split: Split) -> None:
    model = fresh()
    before = model.get_submodule("bn1").running_mean.clone()
    train(model, split, settings(freeze_bn_after=0.0))
    assert torch.equal(before, model.get_submodule("bn1").running_mean)
    train(model, split, settings(freeze_bn_after=0.5))
    assert not torch.equal(before, model.get_submodule("bn1").running_mean)


def test_distillation_loss_is_the_scaled_divergence() -> None:
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = F.softmax(student / 3, 1), F.softmax(teacher / 3, 1)
    expected = 9 * (q * (q / p).log()).sum(1).mean()
    assert torch.allclose(distillation_loss(student, teacher, 3.0), expected)
    binary = distillation_loss(student[:, :1], teacher[:, :1], 1.0)
    ps, qs = torch.sigmoid(student[:, 0]), torch.sigmoid(teacher[:, 0])
    two = (qs * (qs / ps).log() + (1 - qs) * ((1 - qs) / (1 - ps)).log()).mean()
    assert torch.allclose(binary, two)


def test_label_loss_of_one_output_is_binary() -> None:
    logits, y = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])
    assert torch.allclose(label_loss(logits, y), -torch.log(torch.sigmoid(logits)).mean())


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    x[:, :, 5, 3] = 9
    seen = {tuple(int(v) for v in (image[0] == 9).nonzero()[0]) for image in shifted(x, flip=True)}
    assert {top for top, _ in seen} == {3, 4, 5, 6, 7}
    assert {left for _, left in seen} == {1, 2, 3, 4, 5, 10, 11, 12, 13, 14}
    assert all(left <= 5 for _, left in (tuple((im[0] == 9).nonzero()[0].tolist()) for im in shifted(x, flip=False)))


def test_augmentation_shifts_by_an_eighth_of_each_side() -> None:
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 64, 8, dtype=torch.uint8)
    x[:, :, 32, 4] = 9
    seen = {tuple(int(v) for v in (image[0] == 9).nonzero()[0]) for image in shifted(x, flip=False)}
    assert {top for top, _ in seen} == set(range(24, 41))
    assert {left for _, left in seen} == {3, 4, 5}


def test_divergence_and_senseless_settings_are_told(split: Split) -> None:
    with pytest.raises(BadInput, match="diverged"):
        train(fresh(), split, settings().model_copy(update={"lr": 1e12}))
    with pytest.raises(ValueError, match="greater than 0"):
        settings(epochs=0)
    with pytest.raises(DataError):
        train(fresh(), split.subset(np.array([0])), settings())


def test_the_teacher_is_left_alone(split: Split) -> None:
    teacher = fresh()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    train(fresh(), split, settings(), teacher=teacher)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert isinstance(teacher, nn.Module)


def test_feature_loss_is_relative_to_the_teacher() -> None:
    t = {"a": torch.randn(2, 3, 4, 4), "b": torch.randn(2, 5, 2, 2)}
    assert feature_loss(t, t) == 0
    assert feature_loss({k: 0 * v for k, v in t.items()}, t) == pytest.approx(1.0)
    assert feature_loss({"a": t["a"] * 1.5, "b": t["b"]}, t) == pytest.approx(0.25 / 2)


def test_distilled_features_come_closer_to_the_teacher(split: Split) -> None:
    torch.manual_seed(1)
    teacher = build_model(SPEC)
    assert shared_features(fresh(), teacher) == ("layer1.0.relu",)

    def distance(**changed: object) -> float:
        model = fresh()
        train(model, split, settings(epochs=8, lr=0.01, distill=1.0, **changed), teacher=teacher)
        seen: list[dict[str, torch.Tensor]] = [{}, {}]
        with torch.no_grad():
            for network, into in zip((model, teacher), seen, strict=True):
                network(split.tensor(), lambda name, value, into=into: into.update({name: value}))  # type: ignore[misc]
        return float(feature_loss({"a": seen[0]["layer1.0.relu"]}, {"a": seen[1]["layer1.0.relu"]}))

    assert distance(features=1.0) < 0.8 * distance()


def test_features_need_a_teacher_of_the_same_shape(split: Split) -> None:
    with pytest.raises(BadInput, match="in common"):
        train(fresh(), split, settings(features=1.0))
    wide = SPEC.model_copy(update={"stem": Stem(convs=(StemConv(width=8, kernel=3, stride=1),), max_pool=False)})
    wide = wide.replace_blocks({"layer1.0": SPEC.blocks[0].model_copy(update={"widths": (4, 8)})})
    with pytest.raises(BadInput, match="in common"):
        train(fresh(), split, settings(features=1.0), teacher=build_model(wide))


def test_bfloat16_computes_in_bfloat16_and_leaves_a_float32_network(split: Split) -> None:
    seen: set[torch.dtype] = set()
    model = fresh()
    hook = model.get_submodule("layer1.0.conv1").register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    teacher = fresh()
    log = train(model, split, settings(epochs=1, precision="bf16"), teacher=teacher)
    assert seen == {torch.bfloat16}
    assert np.isfinite(log.epochs[-1]["loss"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    seen.clear()
    assert model(torch.zeros(1, *SPEC.input_shape)).dtype == torch.float32
    assert seen == {torch.float32}
    hook.remove()


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 4.0), (0.25, 2.0), (1.0, 3.0)])
def test_the_loss_mixes_teacher_and_labels_as_asked(weight: float, temperature: float) -> None:
    student, teacher = fresh().eval(), build_model(SPEC).eval()
    x, y = torch.randn(6, *SPEC.input_shape), torch.tensor([0, 1, 1, 0, 1, 0])
    loss, correct = _step(student, teacher, x, y, settings(distill=weight, temperature=temperature))
    soft, hard = distillation_loss(student(x), teacher(x), temperature), F.cross_entropy(student(x), y)
    assert loss.item() == pytest.approx((weight * soft + (1 - weight) * hard).item(), rel=1e-5)
    assert correct == int((student(x).argmax(1) == y).sum())


def test_one_output_says_the_second_class_above_zero() -> None:
    one = build_model(SPEC.model_copy(update={"head": Head(num_classes=1)})).eval()
    x = torch.randn(16, *SPEC.input_shape)
    with torch.no_grad():
        one.get_submodule("fc").bias -= one(x).median()  # type: ignore[operator]
    y = (one(x)[:, 0] > 0).long()
    assert 0 < y.sum() < 16
    assert _step(one, None, x, y, settings())[1] == 16
    assert _step(one, None, x, 1 - y, settings())[1] == 0


def test_only_matrices_decay() -> None:
    by_decay = {
        group["weight_decay"]: group["params"] for group in _optimizer(fresh(), settings(weight_decay=0.3)).param_groups
    }
    assert {p.ndim for p in by_decay[0.3]} == {2, 4}
    assert {p.ndim for p in by_decay[0.0]} == {1}
    assert sum(len(params) for params in by_decay.values()) == len(list(fresh().parameters()))


def test_steps_are_those_of_nesterov_momentum() -> None:
    """With gradient 1: v1 = 1, v2 = m + 1, and each step moves by lr (1 + m v) (Sutskever et al. 2013, in torch's form)."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = _optimizer(model, settings(lr=0.1, momentum=0.5, weight_decay=0.0))
    start = model.weight.item()
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert model.weight.item() == pytest.approx(start - 0.1 * ((1 + 0.5) + (1 + 0.5 * 1.5)))


def test_the_learning_rate_rises_and_falls_as_a_cosine(split: Split) -> None:
    rates: list[float] = []
    train(fresh(), split, settings(epochs=5, lr=0.1, warmup=0.2), progress=lambda state: rates.append(state.lr))
    assert len(rates) == 20
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4:] == pytest.approx([0.05 * (1 + np.cos(np.pi * i / 16)) for i in range(16)])


def test_batch_norm_freezes_after_the_fraction_of_steps_that_was_asked_for(split: Split) -> None:
    training: list[bool] = []
    model = fresh()
    norm = model.get_submodule("bn1")
    hook = norm.register_forward_hook(lambda module, _i, _o: training.append(module.training))
    train(model, split, settings(epochs=2, freeze_bn_after=0.5))
    hook.remove()
    assert training == [True] * 4 + [False] * 4


def test_a_teacher_in_training_mode_is_read_in_evaluation(split: Split) -> None:
    torch.manual_seed(5)
    made = build_model(SPEC)
    students = [fresh(), fresh()]
    for student, teacher in zip(students, (copy.deepcopy(made).train(), copy.deepcopy(made).eval()), strict=True):
        train(student, split, settings(epochs=2), teacher=teacher)
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in students), strict=True))


def batch(
    split: Split, how: TrainSettings, step: int, batch_size: int = 16, share: Together = ALONE, drawn: int | None = None
) -> torch.Tensor:
    """Return the inputs of a step; `drawn` takes the place of the step in what is drawn for it."""
    how = how.preset(8, normalised=True)
    x, y = Batches(split, how, batch_size, share).read(step)
    x, _ = arranged(x, y, how, step if drawn is None else drawn, share, flips=split.flips)
    return normalise(x, split.preprocessing)


def test_batches_are_a_function_of_seed_epoch_and_step(split: Split) -> None:
    whole = normalise(split.pixels(np.arange(64))[0], split.preprocessing)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        x = torch.cat([batch(split, settings(seed=seed, augment="none"), 4 * epoch + i) for i in range(4)])
        order = [int((whole - image).abs().flatten(1).sum(1).argmin()) for image in x]
        assert sorted(order) == list(range(64))
        assert torch.equal(whole[order], x)  # not augmented
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 3
    drawn = [batch(split, settings(seed=seed), 0, 64, drawn=step) for seed, step in ((0, 0), (0, 0), (0, 1))]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_augmentation_depends_on_the_seed(split: Split) -> None:
    """The same images in the same order, moved differently."""
    one = dataclasses.replace(split.subset(np.array([3])))
    moved = [batch(one, settings(seed=seed), 0, 1) for seed in range(8)]
    assert len({tuple(image.flatten().tolist()) for image in moved}) > 1


@pytest.mark.parametrize("share", [Together(), Together(1, 2)])
def test_batches_of_small_images_are_what_they_always_were(split: Split, share: Together) -> None:
    """Weights of trainings that are reported stay as they are: the order, the shifts and the mirrors of each step."""
    how = settings(seed=3)
    for step in (0, 5, 11):
        order = np.random.default_rng([3, step // 4]).permutation(64)
        mine = order[step % 4 * 16 : step % 4 * 16 + 16][share.rank :: share.world]
        torch.manual_seed((3 * 1_000_003 + step) * 64 + share.rank)
        n, pixels = len(mine), F.pad(split.pixels(mine)[0], (1, 1, 1, 1))
        top, left = torch.randint(0, 3, (n, 1)), torch.randint(0, 3, (n, 1))
        mirrored = torch.rand(n, 1) < 0.5
        moved = [image[:, t : t + 8, k : k + 8] for image, t, k in zip(pixels, top[:, 0], left[:, 0], strict=True)]
        expected = torch.stack([m.flip(2) if f else m for m, f in zip(moved, mirrored[:, 0], strict=True)])
        assert torch.equal(batch(split, how, step, share=share), normalise(expected, split.preprocessing)), step
