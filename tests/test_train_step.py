"""The step of a training: precision, parts, clipping, mixing, means of weights, uneven classes, what chooses a state."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress import train as training
from compress.averaging import RunningMean
from compress.data import MemoryStore, Split
from compress.losses import class_weights, label_loss
from compress.processes import Together
from compress.resnet import FrozenBatchNorm, build_model
from compress.train import TrainState, _mixers, arranged, train
from rescompress.core.errors import BadInput
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

SPEC = ModelSpec(
    input_shape=(3, 8, 8),
    stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
    head=Head(num_classes=3),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=None),
)


def made(counts: tuple[int, ...] = (24, 24, 24), seed: int = 0) -> Split:
    """Return noisy images whose brightness is their class."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(3), counts)
    x = rng.integers(0, 90, (len(y), 8, 8, 3)) + (y * 80)[:, None, None, None]
    return Split(MemoryStore(x.astype(np.uint8)), y, ("dark", "grey", "bright"), SPEC.preprocessing, f"{counts} {seed}")


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return build_model(SPEC)


def how(**changed: object) -> TrainSettings:
    given = {"epochs": 2.0, "batch_size": 12, "device": "cpu", "teacher": None, "lr": 0.05, "augment": "none"}
    return TrainSettings.model_validate(given | changed)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_output_has_the_loss_of_two(smoothing: float, mixed: bool, weighted: bool) -> None:
    torch.manual_seed(0)
    z, y = torch.randn(20, 1), torch.randint(0, 2, (20,))
    target = F.one_hot(y, 2) * 0.7 + 0.15 if mixed else y
    w = torch.tensor([0.4, 1.6]) if weighted else None
    one = label_loss(z, target, smoothing=smoothing, weights_K=w)
    two = label_loss(F.pad(z, (1, 0)), target, smoothing=smoothing, weights_K=w)
    assert float(one) == pytest.approx(float(two), rel=1e-5)


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_in_parts_has_the_loss_of_the_whole_one(outputs: int, smoothing: float, weighted: bool) -> None:
    """As accumulation and several processes compute it: parts of a few images may hold one class alone."""
    torch.manual_seed(1)
    z, y = torch.randn(24, outputs), torch.randint(0, max(2, outputs), (24,)).sort().values
    w = torch.rand(max(2, outputs)) * 2 if weighted else None
    whole = label_loss(z, y, smoothing=smoothing, weights_K=w)
    parts = sum(
        label_loss(a, b, smoothing=smoothing, weights_K=w) * len(b) / 24 for a, b in zip(z.split(5), y.split(5), strict=True)
    )
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)


def test_every_class_weighs_the_same() -> None:
    labels = np.repeat(np.arange(4), (2, 10, 0, 28))
    w = class_weights(labels, 4)
    totals = w.numpy() * np.bincount(labels, minlength=4)
    assert totals == pytest.approx([40 / 3, 40 / 3, 0, 40 / 3])
    assert class_weights(np.repeat(np.arange(3), 5), 3).tolist() == [1.0, 1.0, 1.0]


def test_rare_classes_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall of the rarest class is higher with either remedy than with none."""
    split, judge = made((100, 100, 4)), made((20, 20, 20), seed=1)

    def recall(**changed: object) -> float:
        model = fresh()
        train(model, split, how(epochs=1.0, lr=0.02, **changed))
        x, y = next(judge.batches(60))
        return float((model(x).argmax(1) == y)[y == 2].float().mean())

    plain = recall()
    assert recall(sampling="balanced") > plain
    assert recall(class_weights="balanced") > plain


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_reduced_precision_learns_and_leaves_a_float32_network(precision: str) -> None:
    split, model = made(), fresh()
    log = train(model, split, how(precision=precision, epochs=6))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert log.epochs[-1]["loss"] < 0.7 * log.epochs[0]["loss"]
    exact = fresh()
    train(exact, split, how(epochs=6))
    same = torch.equal(weights(model), weights(exact))
    assert same == (precision == "tf32"), "a CPU has no TF32; the others compute in what they are called after"


def test_float16_scales_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    real = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scales.append(self.get_scale()) or real(self, loss))
    for precision in ("fp16", "bf16"):
        train(fresh(), made(), how(precision=precision, epochs=0.5))
    assert scales[0] >= 2**10
    assert scales[-1] == 1.0


class Plain(nn.Module):
    """A network without BatchNorm: a step in parts is the same step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(8 * 8 * 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_step_in_parts_is_the_same_step(parts: int) -> None:
    whole, split = Plain(), made()
    train(whole, split, how(lr=0.01))
    pieces = Plain()
    train(pieces, split, how(lr=0.01, accumulate=parts))
    assert torch.allclose(weights(whole), weights(pieces), atol=1e-6)
    assert not torch.allclose(weights(whole), weights(Plain()), atol=1e-3)


def test_gradients_are_shortened_to_the_norm() -> None:
    """One step from rest moves by lr (1 + momentum) times the gradient, whose norm is at most `clip`."""
    start = Plain()
    norms = {}
    for clip in (None, 1e-3):
        model = copy.deepcopy(start)
        train(model, made(), how(epochs=1 / 6, lr=0.1, momentum=0.5, weight_decay=0.0, clip=clip))
        norms[clip] = float((weights(model) - weights(start)).norm())
    assert norms[1e-3] == pytest.approx(0.1 * 1.5 * 1e-3, rel=1e-3)
    assert norms[None] > 10 * norms[1e-3]


def test_the_mean_of_weights_is_what_it_says() -> None:
    model = nn.BatchNorm1d(2)
    mean = RunningMean(model, 0.9)
    expected = model.weight.detach().clone()
    for n in range(60):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([float(n), -2.0 * n]))
        mean.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    now = model.weight.detach().clone()
    mean.swap()
    assert torch.allclose(model.weight, expected, atol=1e-4)
    mean.swap()
    assert torch.equal(model.weight, now)


def test_a_training_ends_with_the_mean_of_its_weights() -> None:
    states: list[torch.Tensor] = []
    model = fresh()
    train(model, made(), how(ema=0.5), progress=lambda state: states.append(weights(model).clone()))
    assert not torch.allclose(weights(model), states[-1])
    exact = fresh()
    train(exact, made(), how())
    assert torch.allclose(states[-1], weights(exact)), "the mean is only looked at"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_images_and_labels_are_mixed_alike(mixup: float, cutmix: float) -> None:
    settings = how(mixup=mixup, cutmix=cutmix).preset(8, normalised=True)
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8).mul(255).to(torch.uint8)  # image i has channel i alone
    kinds = set()
    for step in range(12):
        mixed, labels = arranged(x, torch.arange(3), settings, step, Together(), flips=False, mix=_mixers(settings, 3))
        again = arranged(x, torch.arange(3), settings, step, Together(), flips=False, mix=_mixers(settings, 3))
        assert torch.equal(mixed, again[0])
        assert torch.allclose(mixed.mean((2, 3)) / 255, labels, atol=1e-5), (
            "a label says how much of each class is in the image"
        )
        kinds.add(bool(((mixed == 0) | (mixed == 255)).all()))
    assert kinds == {bool(k) for k in ([True] if not mixup else [False] if not cutmix else [True, False])}


def test_mixed_images_train() -> None:
    model = fresh()
    log = train(model, made(), how(augment="photo+", epochs=4), teacher=fresh().eval())
    assert np.isfinite(log.epochs[-1]["loss"])


def test_the_best_state_on_images_held_out_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four epochs is called the best: the result is what the network was then."""
    answers = iter([(0.5, 1.0), (0.9, 0.4), (0.9, 0.5), (0.2, 2.0)])
    monkeypatch.setattr(training, "_score", lambda *_: next(answers))
    states: dict[int, torch.Tensor] = {}
    model = fresh()
    log = train(model, made(), how(hold_out=0.25, epochs=4), progress=lambda s: states.update({s.step: weights(model).clone()}))
    assert log.best_epoch == 2.0
    assert torch.equal(weights(model), states[max(states) // 2])
    assert [e["held_out_top1"] for e in log.epochs] == [0.5, 0.9, 0.9, 0.2]


def test_the_best_state_outlives_a_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answers(*values: float) -> None:
        left = iter(values)
        monkeypatch.setattr(training, "_score", lambda *_: (next(left), 1.0))

    class Stop(Exception):
        pass

    def stop(state: TrainState) -> None:
        if state.step == 6:
            raise Stop

    settings, whole = how(hold_out=0.25, epochs=2), fresh()  # four steps an epoch
    answers(0.9, 0.1)
    train(whole, made(), settings)
    answers(0.9, 0.1)
    with pytest.raises(Stop):
        train(fresh(), made(), settings, resume_file=tmp_path / "state", save_every_s=0.0, progress=stop)
    answers(0.1)
    again = fresh()
    log = train(again, made(), settings, resume_file=tmp_path / "state")
    assert (log.resumed_at, log.best_epoch) == (5, 1.0)
    assert torch.equal(weights(again), weights(whole))


def test_training_stops_where_it_no_longer_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(0.9, 1.0), (0.8, 1.0), (0.7, 1.0), (0.6, 1.0)])
    monkeypatch.setattr(training, "_score", lambda *_: next(answers))
    steps: list[TrainState] = []
    log = train(fresh(), made(), how(hold_out=0.25, epochs=8, patience=2), progress=steps.append)
    assert len(log.epochs) == 3
    assert steps[-1].step < steps[-1].steps
    with pytest.raises(ValueError, match="give hold_out"):
        how(patience=2)


def test_images_held_out_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bytes] = set()
    judged: set[bytes] = set()
    real_read, real_batches = MemoryStore.read, Split.batches
    split = made()

    def read(self: MemoryStore, index: np.ndarray) -> np.ndarray:
        found = real_read(self, index)
        seen.update(image.tobytes() for image in found)
        return found

    def batches(self: Split, *args: object, **more: object) -> object:
        every = {image.tobytes() for image in real_read(self.store.store, self.store.index)}  # type: ignore[attr-defined]
        judged.update(every)
        before = set(seen)
        yield from real_batches(self, *args, **more)  # type: ignore[arg-type]
        seen.clear()
        seen.update(before)

    monkeypatch.setattr(MemoryStore, "read", read)
    monkeypatch.setattr(Split, "batches", batches)
    train(fresh(), split, how(hold_out=0.25))
    assert judged
    assert not judged & seen
    assert len(judged | seen) == 72


def test_a_learning_rate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates differ by a hundred: the one that is taken is no worse than its neighbours after the same training."""
    monkeypatch.setattr(training, "_TRIED_STEPS", (6, 6))
    monkeypatch.setattr(training, "_TRIED_LR", (0.1, 1.0, 10.0))
    notes: list[str] = []
    split = made()
    model = fresh()
    log = train(model, split, how(lr="auto", epochs=2), note=notes.append)
    usual = 0.02 * 12 / 128
    assert any(log.lr == pytest.approx(usual * times) for times in (0.1, 1.0, 10.0))
    assert any(note.startswith(f"learning rate {log.lr:.2g}") for note in notes)
    again = fresh()
    assert train(again, split, how(lr="auto", epochs=2)).lr == log.lr
    assert torch.equal(weights(model), weights(again))
    lowest = fresh()
    worse = train(lowest, split, how(lr=usual * 0.1, epochs=2))
    assert log.epochs[-1]["loss"] <= worse.epochs[-1]["loss"]


@pytest.mark.parametrize(("norm", "usual"), [("batch", 0.02), ("none", 0.002)])
def test_the_usual_rate_goes_by_what_normalises(norm: str, usual: float) -> None:
    torch.manual_seed(0)
    plain = ModelSpec(
        input_shape=SPEC.input_shape,
        stem=Stem(convs=SPEC.stem.convs, max_pool=False, batch_norm=False, conv_bias=True),
        stages=((Block(name="layer1.0", kind="basic", widths=(4, 4), batch_norm=False, conv_bias=True),),),
        head=SPEC.head,
        preprocessing=SPEC.preprocessing,
    )
    spec = SPEC if norm == "batch" else plain
    default = {k: v for k, v in how().model_dump().items() if k != "lr"}
    assert train(build_model(spec), made(), TrainSettings.model_validate(default | {"epochs": 1})).lr == pytest.approx(usual)
    asked = train(build_model(spec), made(), how(lr=0.03, epochs=1))
    assert asked.lr == 0.03


def test_a_frozen_batch_norm_normalises_nothing() -> None:
    model = fresh()
    assert training._normalised(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            model.set_submodule(name, FrozenBatchNorm(module.num_features))
    assert not training._normalised(model)


def test_a_learning_rate_that_nothing_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_TRIED_LR", (1e14, 1e15))
    with pytest.raises(BadInput, match="every learning rate"):
        train(fresh(), made(), how(lr="auto"))


def test_the_rate_grows_with_the_batch_where_that_is_asked_for() -> None:
    assert train(fresh(), made(), how(epochs=0.5, scale_lr=True, lr=0.128)).lr == pytest.approx(0.012)


def test_losses_that_are_read_late_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the losses of several steps are read together."""
    exact = train(fresh(), made(), how())
    monkeypatch.setattr(training, "_reads_each_step", lambda device: False)
    late = train(fresh(), made(), how())
    assert late.epochs == exact.epochs
    with pytest.raises(BadInput, match="diverged in step"):
        train(fresh(), made(), how(epochs=4).model_copy(update={"lr": 1e14}))
