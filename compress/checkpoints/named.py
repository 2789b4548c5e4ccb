"""Networks by name instead of by file: ``hf:org/name@revision``, ``timm/resnet50.a1_in1k``, ``torchvision/resnet50``.

A name becomes a file in the cache of the library that knows it, and is pinned: to a commit of the hub, or to one of
torchvision's sets of weights. What is published beside the weights (preprocessing, input size, names of the classes, licence)
counts as if the file held it. Safetensors go before pickles, and a pickle goes through the same reader as any other.

Nothing heavy is imported before a name has been recognised as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.checkpoints.path import SUFFIXES
from rescompress.core.errors import CheckpointError, EnvironmentFailed, ToolMissing, nearest

if TYPE_CHECKING:
    from compress.checkpoints.base import Checkpoint

_HUB = re.compile(r"hf:([\w.-]{1,96}/[\w.-]{1,96})((?:/[\w.-]{1,200})+)?(?:@([\w./-]{1,200}))?", re.ASCII)
_TIMM = re.compile(r"timm/(\w{1,80})(\.[\w.-]{1,80})?(?:@([\w./-]{1,200}))?", re.ASCII)
_TORCHVISION = re.compile(r"torchvision/(\w{1,80})(?:@(\w{1,80}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What the hub's libraries call the weights, the better first."""
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.+ -]{1,60}?)[\"']?[ \t]*$", re.MULTILINE | re.IGNORECASE)
_LARGEST_TEXT = 1 << 20
_CONNECT_S = 5.0
_LEAST_STD = 1e-3
_PILLOW = {0: "nearest", 2: "bilinear", 3: "bicubic"}
FORMS = "hf:org/name@revision, timm/resnet50.a1_in1k, torchvision/resnet50"


@dataclass(frozen=True)
class Published:
    """A network that was fetched by its name.

    Attributes:
        name: It, pinned: the same file whenever it is asked for.
        path: The file in the library's cache.
        revision: Commit of the hub, or torchvision's name of the weights.
        licence: As its card states it, or None.
        facts: What stands beside the weights: ``mean``, ``std``, ``resize``, ``geometry``, ``interpolation``, ``input_size``,
            ``config`` (whole).
        notes: What could not be used of it.
    """

    name: str
    path: Path
    revision: str
    licence: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_name(path: str | Path) -> bool:
    """Whether a text names a network rather than a file: a file that is there goes first."""
    text = Path(path).as_posix()
    if text.startswith("hf:"):
        return not _exists(path)
    named = _TIMM.fullmatch(text) or _TORCHVISION.fullmatch(text)
    return named is not None and Path(text).suffix.lower() not in {*SUFFIXES, ".onnx"} and not _exists(path)


def _exists(path: str | Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).exists()
    return False


def fetch(path: str | Path) -> Published:
    """Return the network of a name, fetched unless it is in the cache.

    Args:
        path: A name that `is_name` recognises.

    Raises:
        CheckpointError: There is no such network, revision or file, or it is not open to everybody.
        EnvironmentFailed: It is not in the cache, and there is no connection.
        ToolMissing: The library that knows the name is not installed.
    """
    name = Path(path).as_posix()
    with _told(name):
        if (found := _TORCHVISION.fullmatch(name)) is not None:
            return _torchvision(found[1], found[2])
        if (found := _TIMM.fullmatch(name)) is not None:
            repository = f"timm/{found[1]}{found[2]}" if found[2] else _timm_default(found[1])
            return _hub(repository, None, found[3], short=True)
        found = _HUB.fullmatch(name)
        if found is None or ".." in name:
            raise CheckpointError("is no name of a network on the hub", remedy=f"write it like one of these: {FORMS}")
        return _hub(found[1], found[2][1:] if found[2] else None, found[3])


def load(
    path: str | Path,
    *,
    input_shape: tuple[int, int, int] | None,
    preprocess: str | None,
    arch_options: Mapping[str, str],
    allow_pickle: bool,
) -> Checkpoint:
    """Return the network of a name; the options go before what is published beside it (see `load_checkpoint`)."""
    from compress.checkpoints import facts
    from compress.checkpoints.base import LoadOptions
    from compress.checkpoints.classes import class_names
    from compress.checkpoints.load import load as load_file

    published = fetch(path)
    config = published.facts.get("config", {})
    options = LoadOptions(input_shape, preprocess, dict(arch_options))
    with _told(published.name):
        facts.refuse_variant((config,), options)
    size = published.facts.get("input_size")
    if input_shape is None and size is not None:
        options = dataclasses.replace(options, input_shape=size)
    stated = _statement(published.facts, options, preprocess)
    if stated is not None:
        options = dataclasses.replace(options, preprocess=stated)
    checkpoint = load_file(published.path, options, allow_pickle=allow_pickle)
    notes = list(published.notes)
    classes = checkpoint.spec.num_classes
    if checkpoint.spec.labels is None and classes:
        names, unused = class_names((config,), classes)
        notes += unused
        if names is not None:
            checkpoint = dataclasses.replace(checkpoint, spec=checkpoint.spec.replace(labels=names))
    told = [f"fetched as {published.name}; licence: {published.licence or 'not stated'}", *notes]
    if stated is not None and preprocess is None:
        told.append("preprocessing as it is published beside the weights (else: --preprocess)")
    before = checkpoint.provenance.get("notes", [])
    warnings = checkpoint.provenance.get("warnings", [])
    provenance = {
        **checkpoint.provenance,
        "published": {
            "name": published.name,
            "revision": published.revision,
            "licence": published.licence,
            "file": published.path.name,
            "sha256": _sha256(published.path),
        },
        "notes": [*cast("list[str]", before), *told],
        "warnings": [*cast("list[str]", warnings), *notes],
    }
    return dataclasses.replace(checkpoint, provenance=provenance)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Name the network in errors about it."""
    try:
        yield
    except CheckpointError as e:
        raise CheckpointError(e.what, where=e.where or name, remedy=e.remedy) from e
    except (EnvironmentFailed, ToolMissing) as e:
        raise type(e)(e.what, where=e.where or name, remedy=e.remedy) from e


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _statement(stated: Mapping[str, Any], options: Any, preprocess: str | None) -> str | None:
    """Return what is published about preprocessing, with what the user states in its place; None where nothing is."""
    from compress.preprocessing import Statement

    keys = ("mean", "std", "resize", "geometry", "interpolation")
    known = {key: stated[key] for key in keys if key in stated}
    if options.input_shape is not None and options.input_shape != stated.get("input_size"):
        known.pop("resize", None)  # it is about another input
    if not known:
        return preprocess
    of_theirs = Statement(**known)
    if preprocess is None:
        return str(of_theirs)
    own = {f.name: v for f in dataclasses.fields(Statement) if (v := getattr(Statement.parse(preprocess), f.name)) is not None}
    own.pop("where", None)
    if "name" in own:  # its colours are all of them
        of_theirs = dataclasses.replace(of_theirs, mean=None, std=None)
    return str(dataclasses.replace(of_theirs, **own))


# The hub


def _hub(repository: str, file: str | None, revision: str | None, *, short: bool = False) -> Published:
    """Return a file of a repository of the Hugging Face hub; `short` names begin with ``timm/``."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as e:
        raise ToolMissing("huggingface-hub is not installed", remedy="pip install huggingface-hub") from e
    missing: list[str] = []

    @functools.cache
    def offline() -> bool:
        return not _reachable(_places().get("endpoint") or hub.constants.ENDPOINT)

    for wanted in [file] if file else list(_WEIGHTS):
        try:
            path = _file(hub, repository, wanted, revision, offline=offline)
        except LocalEntryNotFoundError:
            missing.append(wanted)
            continue
        except EntryNotFoundError:
            continue
        if path is not None:
            return _with_card(hub, repository, file, path, short=short, offline=offline)
    if missing:
        at = f" --revision {revision}" if revision else ""
        raise EnvironmentFailed(
            f"is not in the cache ({missing[0]}), and the hub cannot be reached",
            remedy=f"with a connection: hf download {repository} {missing[0]}{'' if file else ' config.json README.md'}{at}",
        )
    raise _no_weights(hub, repository, file, revision)


def _reachable(endpoint: str) -> bool:
    """Whether the hub can be reached: asked once, since its library tries for a minute; behind a proxy it is left to that."""
    if urllib.request.getproxies():
        return True
    place = urllib.parse.urlsplit(endpoint)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        with socket.create_connection((place.hostname or "", port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def _file(hub: Any, repository: str, file: str, revision: str | None, *, offline: Callable[[], bool]) -> Path | None:
    """Return a file of a repository from the cache where its commit is named and it is there, else from the hub.

    None where the cache knows that the commit has no such file.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    places = _places()
    if revision is not None and _COMMIT.fullmatch(revision):
        cached = hub.try_to_load_from_cache(repository, file, cache_dir=places.get("cache_dir"), revision=revision)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None
    try:
        with _quiet():
            return Path(hub.hf_hub_download(repository, file, revision=revision, local_files_only=offline(), **places))
    except EntryNotFoundError:
        raise
    except GatedRepoError as e:
        raise CheckpointError("is not open to everybody", remedy="accept its terms on the hub, then: hf auth login") from e
    except RevisionNotFoundError as e:
        raise CheckpointError(f"has no revision '{revision}'", remedy="leave @revision out, or look it up on the hub") from e
    except RepositoryNotFoundError as e:
        raise CheckpointError(
            "there is no such repository on the hub, and no such file",
            remedy="check the spelling; a private one: hf auth login",
        ) from e
    except HFValidationError as e:
        raise CheckpointError(f"is no name of a repository: {e}", remedy=f"write it like one of these: {FORMS}") from e
    except (HfHubHTTPError, ConnectionError) as e:
        raise EnvironmentFailed(f"the hub answered with an error: {e}", remedy="try again later") from e


def _places() -> dict[str, Any]:
    """Return where the hub and its cache are, as the environment says now."""
    found: dict[str, Any] = {}
    if endpoint := os.environ.get("HF_ENDPOINT"):
        found["endpoint"] = endpoint
    if cache := os.environ.get("HF_HUB_CACHE"):
        found["cache_dir"] = cache
    elif home := os.environ.get("HF_HOME"):
        found["cache_dir"] = str(Path(home).expanduser() / "hub")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Draw no bars inside: files of a ResNet take seconds."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    drawn = not are_progress_bars_disabled()
    if drawn:
        disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            enable_progress_bars()


def _no_weights(hub: Any, repository: str, file: str | None, revision: str | None) -> CheckpointError:
    listed: list[str] = []
    with contextlib.suppress(Exception):  # it is only for the remedy
        endpoint = _places().get("endpoint")
        listed = hub.HfApi(endpoint=endpoint).list_repo_files(repository, revision=revision)
    files = sorted(name for name in listed if Path(name).suffix in SUFFIXES)[:5]
    remedy = "name one of its files: " + ", ".join(f"hf:{repository}/{name}" for name in files) if files else "name another"
    return CheckpointError(f"has no file {file or ' or '.join(_WEIGHTS)}", remedy=remedy)


def _with_card(
    hub: Any, repository: str, file: str | None, path: Path, *, short: bool, offline: Callable[[], bool]
) -> Published:
    """Return a file with what stands beside it at the same commit."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""
    texts: dict[str, str] = {}
    notes = []
    for beside in ("config.json", "preprocessor_config.json", "README.md"):
        try:
            at = _file(hub, repository, beside, commit or None, offline=offline)
            if at is not None and at.stat().st_size <= _LARGEST_TEXT:
                texts[beside] = at.read_text(encoding="utf-8", errors="replace")
        except LocalEntryNotFoundError:
            if beside == "config.json":
                notes.append("config.json is not in the cache and the hub cannot be reached: its facts are assumed")
        except EntryNotFoundError:
            continue
    config, processor = (_mapping(texts.get(name)) for name in ("config.json", "preprocessor_config.json"))
    front = re.match(r"---\r?\n(.*?)\r?\n---", texts.get("README.md", ""), re.DOTALL)
    licence = _LICENCE.search(front[1]) if front else None
    stated, more = _facts(config, processor)
    name = f"{repository}@{commit}" if short else f"hf:{repository}{f'/{file}' if file else ''}@{commit}"
    return Published(name, path, commit, licence[1] if licence else None, stated, (*notes, *more))


def _mapping(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _facts(config: Mapping[str, Any], processor: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a config of timm or of transformers states, and notes on what of it is not used."""
    theirs = config.get("pretrained_cfg")
    timm = theirs if isinstance(theirs, Mapping) else {}
    source = timm or processor
    found: dict[str, Any] = {"config": {k: v for k, v in config.items() if k != "pretrained_cfg"}}
    notes: list[str] = []
    for key, names in {"mean": ("mean", "image_mean"), "std": ("std", "image_std")}.items():
        value = _triple(next((source[n] for n in names if n in source), None))
        if source.get("do_normalize") is False:
            value = (0.0,) * 3 if key == "mean" else (1.0,) * 3
        if value is not None:
            found[key] = value
    if ("mean" in found) != ("std" in found) or min(found.get("std", (1.0,))) < _LEAST_STD:
        notes.append("its mean and standard deviation are not used: they are no numbers to normalise pixels by")
        found.pop("mean", None)
        found.pop("std", None)
    side = None
    shape = _triple(timm.get("input_size"))
    if shape is not None and all(n.is_integer() and 8 <= n <= 4096 for n in shape[1:]):
        found["input_size"] = tuple(map(int, shape))
        side = int(min(shape[1:]))
        if timm.get("test_input_size") not in (None, timm["input_size"]):
            notes.append(f"it is also published for an input of {timm['test_input_size']}: --input")
    size = processor.get("size") if not timm else None
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if type(edge) is int and 8 <= edge <= 4096:
        side, found["input_size"] = edge, (3, edge, edge)
    elif isinstance(size, Mapping) and type(size.get("height")) is int and type(size.get("width")) is int:
        found["input_size"] = (3, size["height"], size["width"])
        found["geometry"] = "squash"
    crop = source.get("crop_pct")
    if side is not None and isinstance(crop, int | float) and 0.3 < crop <= 1:
        found["resize"] = math.floor(side / crop)
    used = source.get("interpolation", _PILLOW.get(cast(int, processor.get("resample"))))
    if used in ("bilinear", "bicubic", "nearest"):
        found["interpolation"] = used
    mode = timm.get("crop_mode", "center")
    if mode == "squash":
        found["geometry"] = "squash"
        found.pop("resize", None)
    elif mode != "center":
        notes.append(f"its crop_mode '{str(mode)[:20]}' is not used: pictures are cut in the centre")
    return found, notes


def _triple(value: object) -> tuple[float, float, float] | None:
    """Return three finite numbers, or None where these are none."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(type(v) in (int, float) and math.isfinite(v) for v in value):
        return None
    return float(value[0]), float(value[1]), float(value[2])


def _timm_default(name: str) -> str:
    """Return the repository of the weights that timm takes for a name without a tag."""
    try:
        import timm
    except ImportError as e:
        raise ToolMissing(
            "without its tag a name of timm is known to timm alone, which is not installed",
            remedy=f"name the weights, such as timm/{name}.a1_in1k, or pip install rescompress[zoo]",
        ) from e
    if not timm.is_model(name):
        raise CheckpointError("timm knows no such network", remedy=nearest(name, timm.list_models("*resne*")))
    found = timm.models.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id or found.hf_hub_filename:
        raise CheckpointError("timm has no weights of it on the hub", remedy="give a checkpoint file")
    return str(found.hf_hub_id)


# torchvision


def _torchvision(name: str, weights: str | None) -> Published:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as e:  # built for another torch, it raises the latter
        raise ToolMissing(f"torchvision is not usable here ({e})", remedy="pip install rescompress[zoo]") from e
    try:
        known = models.get_model_weights(name)
    except ValueError as e:
        raise CheckpointError("torchvision knows no such network", remedy=nearest(name, models.list_models())) from e
    try:
        chosen = known[weights or "DEFAULT"]
    except KeyError as e:
        raise CheckpointError(
            f"torchvision has no weights '{weights}' of it", remedy=nearest(weights or "", [w.name for w in known])
        ) from e
    transforms = chosen.transforms()
    facts: dict[str, Any] = {"config": {"categories": list(chosen.meta.get("categories", []))}}
    crop, resize = getattr(transforms, "crop_size", None), getattr(transforms, "resize_size", None)
    if crop and resize:
        facts["input_size"], facts["resize"] = (3, crop[0], crop[0]), int(resize[0])
        facts["mean"], facts["std"] = tuple(map(float, transforms.mean)), tuple(map(float, transforms.std))
        facts["interpolation"] = transforms.interpolation.value
    return Published(f"torchvision/{name}@{chosen.name}", _downloaded(chosen.url), chosen.name, None, facts)


def _downloaded(url: str) -> Path:
    """Return the file of an address in torch's cache; what it is called ends with the start of its SHA-256."""
    import torch

    file = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    prefix = re.search(r"-([0-9a-f]{8,})\.", file)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None, progress=False)
        except (OSError, RuntimeError) as e:
            raise EnvironmentFailed(
                f"is not in torch's cache and cannot be fetched ({e})", remedy=f"with a connection: curl -L -o {path} {url}"
            ) from e
    if prefix and not _sha256(path).startswith(prefix[1]):
        raise CheckpointError("is damaged: its SHA-256 is not the published one", where=str(path), remedy="remove the file")
    return path
