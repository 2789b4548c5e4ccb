"""``--like``: tensors under names that say nothing, in the order of a known network, where exactly one assignment exists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rescompress as rc
from compress import zoo
from compress.importers.proof import difference
from compress.resnet import build_model
from rescompress.core.errors import BadInput, CheckpointError


def random_state(name: str) -> Mapping[str, Tensor]:
    torch.manual_seed(0)
    model = build_model(zoo.spec(name, num_classes=7))
    state = {k: torch.rand_like(v) + 0.5 if v.is_floating_point() and v.ndim == 1 else v for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def renamed(state: Mapping[str, Tensor], *, first: bool = False, behind: bool = False) -> dict[str, Tensor]:
    """Return a state under numbers, in an order in which people write blocks."""
    owners = list(dict.fromkeys(k.rpartition(".")[0] for k in state))
    blocks: dict[str, list[str]] = {}
    for owner in owners:
        blocks.setdefault(".".join(owner.split(".")[:2]) if owner.startswith("layer") else owner, []).append(owner)
    order: list[str] = []
    for members in blocks.values():
        short, main = ([m for m in members if (".downsample." in m) == which] for which in (True, False))
        parts = short + main if first else main + short
        norms = {m for m in parts if f"{m}.running_mean" in state}
        order += sorted(parts, key=lambda m: m in norms) if behind and len(members) > 1 else parts
    return {f"m{i}.{k.rpartition('.')[2]}": state[k] for i, o in enumerate(order) for k in state if k.rpartition(".")[0] == o}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "name", ["resnet20", "resnet20_b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "resnet26d"))]
)
def test_a_state_under_other_names_is_found_by_its_shapes(name: str, first: bool, behind: bool, tmp_path: Path) -> None:
    state = random_state(name)
    torch.save({"whatever": renamed(state, first=first, behind=behind), "optimizer": {"x": torch.ones(2)}}, tmp_path / "net.pt")
    shape = (3, 32, 32)
    checkpoint = rc.load_checkpoint(tmp_path / "net.pt", arch_options={"like": name}, input_shape=shape)
    assert checkpoint.network.num_classes == 7
    x = torch.randn(2, *shape)
    wanted = build_model(
        zoo.spec(name, num_classes=7, input_shape=shape), {**build_model(zoo.spec(name, num_classes=7)).state_dict(), **state}
    )
    assert difference(build_model(checkpoint.network, checkpoint.state_dict)(x), wanted(x)) == 0.0
    assert "nothing else proves it" in str(checkpoint.provenance["warnings"])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.save(renamed(random_state("resnet20")), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"make no resnet32.*modules where") as caught:
        rc.load_checkpoint(tmp_path / "net.pt", arch_options={"like": "resnet32"})
    assert "--code" in str(caught.value.remedy)
    with pytest.raises(BadInput, match="unknown architecture 'resnet21'"):
        rc.load_checkpoint(tmp_path / "net.pt", arch_options={"like": "resnet21"})
    state = renamed(random_state("resnet20"))
    torch.save({**state, "m3.gate": torch.ones(3)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"m3\.gate.*role"):
        rc.load_checkpoint(tmp_path / "net.pt", arch_options={"like": "resnet20"})
    with pytest.raises(CheckpointError, match="--code and --like"):
        rc.load_checkpoint(tmp_path / "net.pt", arch_options={"like": "resnet20", "code": "a.py:b"})
