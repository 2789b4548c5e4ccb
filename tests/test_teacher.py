"""A teacher means what its student means: its classes by name, its pictures prepared its own way; or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import ptq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import zoo
from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import MemoryStore, Split, normalise
from compress.quantize import fake_quant_model
from compress.resnet import build_model, tensors_of
from compress.teacher import _order, match_teacher, reordered
from compress.train import train
from rescompress.core.errors import BadInput
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv
from rescompress.runs.stage import Opening

CLASSES = ("ant", "bee", "cow", "dog")
SPEC = ModelSpec(
    input_shape=(3, 8, 8),
    stem=Stem(convs=(StemConv(width=8, kernel=3, stride=1),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(8, 8)),),),
    head=Head(num_classes=4),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=None, assumed=False),
    labels=CLASSES,
)
PIXELS = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), dtype=np.uint8)


def checkpoint(spec: ModelSpec = SPEC, seed: int = 1) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(spec, tensors_of(build_model(spec)))


def split(p: Preprocessing = SPEC.preprocessing) -> Split:
    return Split(MemoryStore(PIXELS), np.arange(16) % 4, CLASSES, p, "test")


def trained(teacher: Checkpoint, student: ModelSpec = SPEC, **changed: object) -> dict[str, Tensor]:
    """Return a student's weights after two epochs with a teacher."""
    model = build_model(student, checkpoint(seed=2).state_dict)
    how = TrainSettings(**{"epochs": 2, "batch_size": 8, "device": "cpu"} | changed)  # type: ignore[arg-type]
    network = fake_quant_model(teacher) if teacher.quantization else build_model(teacher.spec, teacher.state_dict)
    train(model, split(student.preprocessing), how, teacher=network, teacher_preprocessing=teacher.spec.preprocessing)
    return tensors_of(model)


def permuted(teacher: Checkpoint, order: list[int]) -> Checkpoint:
    """Return the teacher as somebody would have trained it with the classes in another order."""
    tensors = dict(teacher.state_dict)
    for part in ("fc.weight", "fc.bias"):
        tensors[part] = tensors[part][order].clone()
    return Checkpoint(teacher.spec.replace(labels=tuple(CLASSES[i] for i in order)), tensors)


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_a_permuted_teacher_teaches_the_very_same(features: float) -> None:
    plain, other = checkpoint(), permuted(checkpoint(), [2, 0, 3, 1])
    matched, notes = match_teacher(other, SPEC)
    assert "another order" in " ".join(notes)
    wanted, found, wrong = (trained(t, features=features) for t in (plain, matched, other))
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert not all(torch.equal(wrong[k], wanted[k]) for k in wanted)


SPELLINGS = (str, str.upper, str.title, lambda name: name.replace(" ", "_"))
NUMBERS = st.tuples(*[st.floats(0.1, 200.0)] * 3)


@st.composite
def teachers(draw: st.DrawFn) -> dict[str, object]:
    """A student's names and preprocessing, and a teacher of the same classes, or nearly the same."""
    names = draw(
        st.lists(st.sampled_from(["ant", "Bee", "cow 2", "\u00e4hre", "eel", "7", "fox"]), min_size=4, max_size=4, unique=True)
    )
    theirs = [draw(st.sampled_from(SPELLINGS))(name) for name in draw(st.permutations(names))]
    if draw(st.integers(0, 5)) == 0:
        theirs[draw(st.integers(0, 3))] = draw(st.sampled_from(["gnu", theirs[0]]))
    prepared = [
        Preprocessing(
            mean=draw(NUMBERS), std=draw(NUMBERS), scale=draw(st.sampled_from([1.0, 255.0])), resize=None,
            channel_order=draw(st.sampled_from(["rgb", "bgr"])), assumed=draw(st.booleans()),
        )
        for _ in range(2)
    ]  # fmt: skip
    known = draw(st.sampled_from(["both", "student", "teacher", "data", "none"]))
    return {"names": names, "theirs": theirs, "prepared": prepared, "known": known}


def means_the_same(case: dict[str, Any]) -> None:
    """Either every class gets the number that the teacher itself gives the class of that name, or it is refused, or told."""
    names, theirs, (mine, own), known = case["names"], case["theirs"], case["prepared"], case["known"]
    student = SPEC.replace(labels=tuple(names) if known in ("both", "student") else None, preprocessing=mine)
    labels = tuple(theirs) if known in ("both", "teacher", "data") else None
    teacher = checkpoint(SPEC.replace(labels=labels, preprocessing=own))
    try:
        matched, notes = match_teacher(teacher, student, names if known == "data" else ())
    except BadInput:
        assert sorted(map(plain, theirs)) != sorted(map(plain, names)), "classes of the same names are refused"
        return
    seen = mine if own.assumed and not mine.assumed else own
    pixels = torch.from_numpy(PIXELS[:3]).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = build_model(teacher.spec, teacher.state_dict)(normalise(pixels, seen))
        found = build_model(matched.spec, matched.state_dict)(normalise(pixels, matched.spec.preprocessing))
    told = " ".join(notes)
    if known in ("both", "data") and sorted(map(plain, theirs)) == sorted(map(plain, names)):
        at = [[plain(t) for t in theirs].index(plain(name)) for name in names]
        assert torch.equal(found, wanted[:, at]), case
        assert at == [0, 1, 2, 3] or "another order" in told
    else:
        assert known not in ("both",), "other classes are taken"
        assert torch.equal(found, wanted), case
        assert (known == "none") == (told.count("does not name its classes") == 0)


def plain(name: str) -> str:
    """The name without what spellings differ in."""
    return name.casefold().replace("_", " ")


@settings(max_examples=10, deadline=None)
@given(teachers())
def test_a_teacher_means_the_same_or_it_is_refused_or_told(case: dict[str, Any]) -> None:
    means_the_same(case)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(teachers())
def test_many_teachers_mean_the_same_or_are_refused_or_told(case: dict[str, Any]) -> None:
    means_the_same(case)


def test_a_quantized_teacher_is_put_in_order_with_its_scales() -> None:
    x = torch.randn(8, 3, 8, 8)
    plain = ptq(checkpoint(), [x])
    order = [3, 1, 0, 2]
    back = reordered(reordered(plain, order), [order.index(i) for i in range(4)])
    with torch.no_grad():
        once = fake_quant_model(reordered(plain, order))(x)
        assert torch.equal(once, fake_quant_model(plain)(x)[:, order])
    assert back.quantization == plain.quantization
    assert all(torch.equal(back.state_dict[k], v) for k, v in plain.state_dict.items())


def test_a_teacher_with_two_classes_of_one_name_may_have_the_same_order() -> None:
    """ImageNet has two cranes; another order of them is nobody's to know."""
    student = SPEC.replace(labels=("crane", "bee", "crane", "dog"))
    teacher = checkpoint(student)
    assert match_teacher(teacher, student)[0].spec == teacher.spec
    with pytest.raises(BadInput):
        match_teacher(checkpoint(student.replace(labels=("bee", "crane", "crane", "dog"))), student)


def test_two_classes_of_one_output_swap_by_sign() -> None:
    one = SPEC.replace(head=Head(num_classes=1), labels=("cat", "dog"))
    teacher = checkpoint(one.replace(labels=("dog", "cat")))
    matched, _ = match_teacher(teacher, one)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        a, b = (build_model(t.spec, t.state_dict)(x) for t in (teacher, matched))
    assert torch.equal(a, -b)


def test_the_teacher_sees_its_own_preprocessing() -> None:
    """The same pictures in the same order, prepared as the teacher's file says."""
    p = Preprocessing(
        name="bgr", mean=(100.0,) * 3, std=(50.0,) * 3, scale=1.0, channel_order="bgr", resize=None, assumed=False
    )
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3)) @ torch.ones(3, 4)

    model = build_model(SPEC, checkpoint().state_dict)
    how = TrainSettings(epochs=1, batch_size=16, device="cpu", augment="none")
    train(model, split(), how, teacher=Spy(), teacher_preprocessing=p)
    wanted = normalise(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), p)
    order = [int((wanted - image).abs().flatten(1).sum(1).argmin()) for image in seen[0]]
    assert sorted(order) == list(range(16))
    assert torch.equal(seen[0], wanted[order])

    theirs = checkpoint(SPEC.replace(preprocessing=p))
    matched, notes = match_teacher(theirs, SPEC)
    assert matched.spec.preprocessing == p
    assert "'bgr'" in " ".join(notes)


def test_a_caffe_teacher_teaches_what_the_plain_one_does() -> None:
    """The same function of pixels, once for -1..1 RGB, once for BGR less the same mean: the students come out alike."""
    half = zoo.preprocessing("half", (3, 8, 8), assumed=False)
    caffe = Preprocessing(mean=(127.5,) * 3, std=(1.0,) * 3, scale=1.0, channel_order="bgr", resize=None, assumed=False)
    plain = checkpoint(SPEC.replace(preprocessing=half))
    tensors = dict(plain.state_dict)
    tensors["conv1.weight"] = (tensors["conv1.weight"] / 127.5).flip(1).contiguous()
    other, _ = match_teacher(Checkpoint(SPEC.replace(preprocessing=caffe), tensors), SPEC)
    wanted, found = trained(plain), trained(other)
    assert all(torch.allclose(found[k], wanted[k], atol=1e-4) for k in wanted)


def test_an_assumed_preprocessing_gives_way_to_the_student_s() -> None:
    guess = SPEC.preprocessing.model_copy(update={"assumed": True, "mean": (0.1,) * 3})
    matched, notes = match_teacher(checkpoint(SPEC.replace(preprocessing=guess)), SPEC)
    assert matched.spec.preprocessing == SPEC.preprocessing
    assert notes == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": ("ant", "bee", "cow", "eel")}, "'eel'.*'dog'"),
        ({"input_shape": (3, 16, 16)}, "16"),
        ({"head": Head(num_classes=5), "labels": None}, "5 classes"),
    ],
)
def test_a_teacher_that_cannot_be_matched_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        match_teacher(checkpoint(SPEC.replace(**changed)), SPEC)


def test_what_cannot_be_known_is_told() -> None:
    silent = checkpoint(SPEC.replace(labels=None))
    assert "does not name its classes" in " ".join(match_teacher(silent, SPEC)[1])
    assert "does not name its classes" in " ".join(match_teacher(checkpoint(), SPEC.replace(labels=None))[1])
    assert match_teacher(silent, SPEC.replace(labels=None))[1] == []
    squashed = SPEC.preprocessing.model_copy(update={"resize": 10})
    assert "resized to 10" in " ".join(match_teacher(checkpoint(SPEC.replace(preprocessing=squashed)), SPEC)[1])


def test_what_the_teacher_s_file_states_goes_before_what_is_stated_of_the_network(tmp_path: Path) -> None:
    own = SPEC.preprocessing.model_copy(update={"name": "own", "mean": (0.1,) * 3})
    for assumed, wanted in ((False, "own"), (True, "half")):
        spec = SPEC.replace(preprocessing=own.model_copy(update={"assumed": assumed}))
        save_checkpoint(checkpoint(spec), tmp_path / "teacher.safetensors")
        teacher = Opening(tmp_path / "net.pt", preprocess="half").of(tmp_path / "teacher.safetensors")
        assert teacher.load().spec.preprocessing.name == wanted


def test_classes_of_a_teacher_are_known_in_other_spellings() -> None:
    assert _order(("golden retriever", "CAT", "\u00e4hre"), ("cat", "Golden_Retriever", "a\u0308hre")) == [1, 0, 2]
    assert _order(("Cat", "cat"), ("cat", "Cat")) == [1, 0]
    assert _order(("Cat", "cat"), ("CAT", "cat")) is None
    assert _order(("cats", "dog"), ("cat", "dog")) is None
