"""Grid files: what a person writes, and the runs that it means.

    grid = read_grid("data/grids/w_s.yaml")
    plan = make_plan(grid, "results/w_s")  # plan.jobs, each with the name of its folder

README.md, "Grids of runs", says what may stand in a grid file.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from sude_lab.config import EMBEDDED
from sude_lab.errors import UserError
from sude_lab.evaluate.dreambench import load_dreambench
from sude_lab.evaluate.evaluate import FOLDER, prompts_of, settings_and_variants, subject_name
from sude_lab.io.opening import hub_id, read_facts, resolve_source
from sude_lab.io.pictures import load_picture
from sude_lab.io.reading import is_file, kinds_of, read_text, read_yaml, taken
from sude_lab.tuning import TuningConfig, with_defaults
from sude_lab.world import subjects as study
from sude_lab.world.drawing import Scene

VARIANT = ("w_s", "truncation", "prior", "weighting")
ASKED = (
    *("references", "structure", "num_seeds", "seed", "metrics", "encoders"),
    *("num_inference_steps", "guidance_scale", "negative_prompt"),
)
ASSUMED = (
    *("seconds_per_step", "seconds_per_picture", "megabytes_per_run", "megabytes_per_picture"),
    *("sude_factor", "price_per_gpu_hour", "source"),
)
_TEXTS = ("references", "structure", "negative_prompt", "source")
_WHOLE = {"num_seeds": 1, "seed": 0, "num_inference_steps": 1}
"""What the keys of `evaluate` and `assume` hold, and the least of it; the others are numbers."""
MOST_RUNS = 100_000
KEYS = (
    *("subjects", "methods", *VARIANT, "seeds", "backbone", "settings", "also"),
    *("prompts", "pictures", "evaluate", "num_gpus", "assume"),
)
_OWN_KEY = {
    **{"image": "subjects", "category": "subjects", "method": "methods", "seed": "seeds"},
    **{"backbone": "backbone", "weight_sude": "w_s", "prior": "prior", "weighting": "weighting"},
    **{"truncate": "truncation", "truncate_at": "truncation"},
}
"""Fields of `TuningConfig` that the grid's own keys say."""
_BANK = ("prior_bank", "prior_bank_dtype")


@dataclass(frozen=True)
class GridSubject:
    """Whom to tune on: a picture file, or a drawn subject whose picture is `png`."""

    name: str
    category: str
    image: Path | None = None
    png: bytes = b""
    scene: Scene | None = None
    references: Path | None = None


@dataclass(frozen=True)
class Grid:
    """A grid file, read: the runs are the product of all its lists."""

    subjects: tuple[GridSubject, ...]
    methods: tuple[str, ...]
    variants: tuple[dict[str, Any], ...]
    """The uses of SuDe: fields of `TuningConfig`, and `factor` for a w_s of the kind x2."""
    settings: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    backbones: tuple[str, ...]
    asked: dict[str, Any]
    """Arguments of `evaluate`."""
    num_gpus: float
    """What a run takes of a cluster's GPUs."""
    assume: dict[str, Any]
    """Times and sizes for the dry run, for runs that nobody has measured."""


def read_grid(path: Path | str) -> Grid:
    """Read a grid file (YAML).

    Raises:
        UserError: it cannot be read, or holds a key or a value that means nothing.
    """
    what = f"The grid {path}"
    given = read_yaml(read_text(path, what, "a YAML file"), what)
    try:
        return _grid(_mapping(given, KEYS, "the grid"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _grid(given: dict[str, Any]) -> Grid:
    if "subjects" not in given:
        raise UserError("the grid names no `subjects`: write for example - held-out 0 1 2.")
    subjects = tuple(itertools.chain(*map(_subjects, _list(given, "subjects"))))
    names = [s.name for s in subjects]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"two subjects are named {twice[0]}: name one, or rename its picture.")
    variants = [given, *(_mapping(x, VARIANT, "also") for x in _list(given, "also", []))]
    asked = dict(_mapping(given.get("evaluate", {}), ASKED, "evaluate"))
    for name in {"metrics", "encoders"} & asked.keys():
        asked[name] = tuple(map(str, _list(asked, name)))
    assume = _mapping(given.get("assume", {}), ASSUMED, "assume")
    _check_values(asked)
    _check_values(assume)
    prompts = map(Path, map(str, _list(given, "prompts", ["attributes"])))
    asked["prompts"] = tuple(str(p.absolute() if is_file(p) else p) for p in prompts)
    asked["num_images"] = _number(given, "pictures", 4, whole=True)
    gpus = float(torch.cuda.is_available())
    return Grid(
        subjects,
        tuple(map(str, _list(given, "methods", ["dreambooth"]))),
        tuple(itertools.chain(*map(_variants, variants))),
        tuple(_settings(given.get("settings", {}))),
        tuple(_typed("seed", x) for x in _list(given, "seeds", [0])),
        tuple(_typed("backbone", x) for x in _list(given, "backbone", [EMBEDDED])),
        asked,
        _number(given, "num_gpus", gpus),
        assume,
    )


def _check_values(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _TEXTS:
            if not isinstance(value, str) or "\0" in value:
                raise UserError(f"{name} cannot be {value!r}: it takes a text.")
        elif name == "guidance_scale":
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise UserError(f"{name} cannot be {value!r}: it takes a number.")
        elif name in ASKED and name not in _WHOLE:
            continue
        else:  # a time may be given for each method
            several = isinstance(value, dict) and name in ASSUMED
            for part in value if several else [name]:
                whole = name in _WHOLE
                _number(value if several else given, part, 0, whole=whole, low=_WHOLE.get(name, 0))


def _mapping(given: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping, with keys among {', '.join(known)}.")
    for key in given:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"use {', '.join(known)}."
            raise UserError(f"{where} has the unknown key {key!r}: {hint}")
    return given


def _list(given: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
    values = given.get(key, default)
    values = values if isinstance(values, list) else [values]
    if not values and default != []:
        raise UserError(f"{key}: the list is empty, so there is nothing to run.")
    return values


def _number(
    given: Mapping[str, Any], key: str, default: float, whole: bool = False, low: int | None = None
) -> Any:
    value = given.get(key, default)
    kinds: Any = int if whole else int | float
    low = int(whole) if low is None else low
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= 2**32:
        raise UserError(f"{key} cannot be {value!r}: it takes a number, at least {low}.")
    return value


def _product(axes: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Return the product of lists; it must be one that can ever be run."""
    number = math.prod(map(len, axes))
    if number > MOST_RUNS:
        raise UserError(f"the lists mean {number:,} runs: a grid has at most {MOST_RUNS:,}.")
    return itertools.product(*axes)


def _subjects(entry: Any) -> Iterator[GridSubject]:
    """Read one entry of `subjects`; it may stand for several."""
    if isinstance(entry, str):
        group, *numbers = entry.split() or [""]
        known = group in ("development", "held-out", "demo")
        if not known or not numbers or not all(re.fullmatch("[0-9]{1,9}", n) for n in numbers):
            raise UserError(
                f"subjects: {entry!r} is no drawn subject: write held-out (or development, demo) "
                "and numbers, or a mapping with picture and category, or with dreambench."
            )
        for who in (study.subject(group, int(n)) for n in numbers):
            png = io.BytesIO()
            who.picture.save(png, format="png")
            yield GridSubject(who.name, who.scene.category, None, png.getvalue(), who.scene)
    elif isinstance(entry, dict) and "dreambench" in entry:
        _mapping(entry, ("dreambench", "names"), "subjects")
        bench = load_dreambench(Path(str(entry["dreambench"])).absolute())
        names = map(str, _list(entry, "names", list(bench.subjects)))
        for one in (bench.subject(n) for n in names):
            yield GridSubject(one.name, one.category, one.picture, references=bench.folder)
    else:
        entry = _mapping(entry, ("picture", "category", "references"), "subjects")
        if not {"picture", "category"} <= entry.keys():
            raise UserError(f"subjects: {entry!r} needs a picture and a category.")
        image, category = Path(str(entry["picture"])).absolute(), str(entry["category"])
        load_picture(image, resolution=64)  # says what is wrong with it
        references = Path(str(entry["references"])).absolute() if "references" in entry else None
        name = subject_name(TuningConfig(image, category))
        yield GridSubject(name, " ".join(category.split()), image, references=references)


def _variants(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the product of w_s, truncation, prior and weighting of a grid, or of one of `also`."""
    axes = [
        [_weight(x) for x in _list(block, "w_s", ["x1"])],
        [_truncation(x) for x in _list(block, "truncation", [True])],
        *([{k: _typed(k, x)} for x in _list(block, k, [None])] for k in ("prior", "weighting")),
    ]
    for parts in _product(axes):
        yield {k: v for part in parts for k, v in part.items()}


def _weight(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.startswith("x"):
        return {"factor": _typed("weight_sude", value[1:])}
    return {"weight_sude": _typed("weight_sude", value)}


def _truncation(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"truncate": value}
    if isinstance(value, int | float):
        return {"truncate_at": float(value)}
    raise UserError(f"truncation cannot be {value!r}: write on, off, or the rho to stop at.")


def _settings(given: Any) -> Iterator[dict[str, Any]]:
    """Return the product of `settings`: a list is an axis."""
    for name in _mapping(given, [f.name for f in fields(TuningConfig)], "settings"):
        if name in _OWN_KEY:
            raise UserError(f"settings: {name} is what the grid's key {_OWN_KEY[name]} says.")
    several = {k: [v] if k == "more_subjects" else v for k, v in given.items()}
    axes = [[(k, _typed(k, x)) for x in _list(several, k)] for k in several]
    return (dict(parts) for parts in _product(axes))


def _typed(name: str, value: Any) -> Any:
    """Return a value as its field of `TuningConfig` holds it, or say what that takes."""
    kinds = kinds_of(get_type_hints(TuningConfig)[name])
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif get_origin(kind) is tuple and isinstance(value, list):
            return tuple(map(str, value))
        elif kind is float and not isinstance(value, bool | None):
            try:
                return float(value)  # YAML reads 1e-4 as text
            except (TypeError, ValueError, OverflowError):
                continue
        elif kind is Path and isinstance(value, str):
            return Path(value).absolute()
        elif kind in (int, str, bool, NoneType) and type(value) is kind:
            return value
    raise UserError(f"{name} cannot be {value!r}: it takes {taken(kinds)}.")


# --- the runs of a grid --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run of a grid, and what is asked of it."""

    key: str
    config: TuningConfig
    label: dict[str, Any]
    """What the table says of it beside the scores."""
    scene: Scene | None
    asked: dict[str, Any]
    rows: str
    """Name of the file of its scores: a hash of all that is asked."""
    pictures: int

    def scores(self, runs: Path) -> Path:
        """Return the file of its scores, whose presence says that it is finished."""
        return runs / self.key / FOLDER / self.rows


@dataclass(frozen=True)
class Plan:
    """All runs of a grid, and where they are."""

    grid: Grid
    out: Path
    runs: Path
    jobs: tuple[Job, ...]
    num_equal: int
    """How many more the lists name that are equal to one of these."""


def make_plan(grid: Grid, out: Path | str, runs: Path | str | None = None) -> Plan:
    """List the runs of a grid; nothing is written, and no model is opened.

    Order: backbone, seed, subject, method, settings, then `also` after w_s, truncation, prior,
    weighting (what is named last changes fastest): all variants of one subject stand together, and
    every subject is seen once before the second seed begins. Equal runs are one: without SuDe
    (w_s 0) its other settings say nothing.

    Args:
        grid: The grid.
        out: Folder of the sweep.
        runs: Folder of the runs; None: OUT/runs.

    Raises:
        UserError: the settings, or the prompts for a subject, mean nothing.
    """
    out = Path(os.path.abspath(out))
    jobs: dict[str, Job] = {}
    counts: dict[Any, int] = {}
    digests = {s.name: _digest(s.image or s.png) for s in grid.subjects}
    total = 0
    axes = (grid.backbones, grid.seeds, grid.subjects, grid.methods, grid.settings, grid.variants)
    for backbone, seed, who, method, settings, variant in _product(axes):
        total += 1
        config, usual = _config(
            {k: v for k, v in (settings | variant).items() if k != "factor"}
            | {"image": who.image or out / "subjects" / f"{who.name}.png"}
            | {"category": who.category, "method": method, "seed": seed, "backbone": backbone},
            variant.get("factor", 1.0),
        )
        key = _key(config, digests[who.name])
        if key in jobs:
            continue
        references = str(who.references) if who.references else grid.asked.get("references")
        asked = grid.asked | ({"references": references} if references else {})
        # Runs of one seed are drawn from the same noise, those of another from fresh.
        asked |= {"seed": grid.asked.get("seed", 0) + seed}
        kind = (who.name, method, backbone, config.prompt, config.more_subjects)
        if kind not in counts:
            counts[kind] = len(
                prompts_of(
                    config,
                    asked["prompts"],
                    structure=asked.get("structure", "default"),
                    references=Path(references) if references else None,
                    scene=who.scene,
                )
            )
        prompts = [_digest(Path(p)) if is_file(p) else p for p in asked["prompts"]]
        label = {"run": key, "subject": who.name, "category": config.category, "method": method}
        label |= {"backbone": backbone, "tuning_seed": seed, "w_s": config.weight_sude}
        label |= {"w_s_factor": (config.weight_sude or 0.0) / usual if usual else None}
        label |= {k: getattr(config, k) for k in ("truncate", "truncate_at", "prior", "weighting")}
        jobs[key] = Job(
            key,
            config,
            label | {"steps": config.max_train_steps},
            who.scene,
            asked,
            f"rows-{_hash([asked | {'prompts': prompts}, repr(who.scene)])[:10]}.parquet",
            counts[kind] * asked["num_images"] * asked.get("num_seeds", 1),
        )
    names = settings_and_variants([job.config for job in jobs.values()])
    for job, (general, sude) in zip(jobs.values(), names, strict=True):
        job.label.update(settings=general, variant=sude)
    where = Path(os.path.abspath(runs)) if runs is not None else out / "runs"
    return Plan(grid, out, where, tuple(jobs.values()), total - len(jobs))


def _config(given: dict[str, Any], factor: float) -> tuple[TuningConfig, float]:
    """Return the configuration with its defaults filled in, and the method's own w_s."""
    config = TuningConfig(**given)
    facts = read_facts(config.backbone)
    alone = TuningConfig(config.image, config.category, config.backbone, config.method)
    usual = with_defaults(alone, facts)
    assert usual.weight_sude is not None
    if config.weight_sude is None:
        config = replace(config, weight_sude=usual.weight_sude * factor)
    config = with_defaults(config, facts)
    if not config.with_sude:
        # The bank's pairs stay: without SuDe a run draws the samples that its like with SuDe draws.
        apart = ("prior", "weighting", "truncate", "truncate_at", "prior_bank_dtype")
        config = replace(config, **{name: getattr(usual, name) for name in apart})
    elif not config.truncate:
        config = replace(config, truncate_at=usual.truncate_at)
    if not config.prior_loss_weight:
        config = replace(config, class_images=usual.class_images)
    if not config.prior_bank:
        config = replace(config, **{name: getattr(usual, name) for name in _BANK})
    return config, usual.weight_sude


def kind_of(config: TuningConfig) -> str:
    """Name what a step's time hangs on: model, method, what is trained, SuDe, batch, resolution."""
    size = (config.train_batch_size or 1) * config.gradient_accumulation_steps
    sude = "SuDe" if config.with_sude else "plain"
    if sude == "SuDe" and config.prior_bank and config.prior_bank_dtype != "live":
        sude = "SuDe from a prior bank"
    train = f" {config.train}" if config.method == "dreambooth" else ""
    side = f", {config.resolution} px" if config.resolution else ""
    return f"{Path(config.backbone).name}, {config.method}{train}, {sude}, batch {size}{side}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _digest(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(config: TuningConfig, picture: str) -> str:
    """Name a run by what it is: not by where its files lie, nor by the device it runs on."""
    where = ("image", "device", "backbone", "class_images", "more_subjects")
    # A field at its default says nothing: fields that are added later leave the names as they are.
    # Where a default changed, its first value says nothing still: a name means the same forever.
    silent = {f.name: f.default for f in fields(config)} | {"optimizer": "adamw"}
    about = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in where and getattr(config, f.name) != silent[f.name]
    }
    others = [(s.category, s.token, _digest(s.image)) for s in config.subjects[1:]]
    own = [_digest(p) for p in _class_files(config)]
    return _hash([about, picture, others, own, backbone_identity(config.backbone)])[:16]


def _class_files(config: TuningConfig) -> list[Path]:
    """Return the files of the folder of class images, and of its folders for the categories."""
    if config.class_images is None:
        return []
    folders = {config.class_images, *(config.class_images / s.category for s in config.subjects)}
    return sorted(p for folder in folders for p in folder.glob("*") if p.is_file())


def backbone_identity(source: str) -> str:
    """Return a hash of a pipeline folder's files, or a hub id with the commit that it stands for.

    Where neither the hub nor its cache knows the id, the id itself.
    """
    return _identity(resolve_source(source))


@cache
def _identity(source: str) -> str:
    folder = Path(source)
    if folder.is_dir():
        kinds = (".json", ".txt", ".safetensors", ".model")
        walked = os.walk(folder, followlinks=True)
        files = sorted(Path(root, name) for root, _, names in walked for name in names)
        files = [path for path in files if path.suffix in kinds]
        return _hash([(p.relative_to(folder).as_posix(), _digest(p)) for p in files])
    told = hub_id(source)
    if told is None or _is_commit(told[1]):
        return source
    from huggingface_hub import HfApi, try_to_load_from_cache

    name, revision = told
    try:
        return f"{name}@{HfApi().model_info(name, revision=revision, timeout=10).sha}"
    except Exception:  # no connection, no such model: errors of any class
        try:
            cached = try_to_load_from_cache(name, "model_index.json", revision=revision)
        except ValueError:  # no id of a repository at all
            cached = None
    return f"{name}@{Path(cached).parent.name}" if isinstance(cached, str) else source


def is_known(source: str) -> bool:
    """Whether it is known what a backbone stands for: a folder, or a commit of a hub id."""
    told = hub_id(source)
    return backbone_identity(source) != source or (told is not None and _is_commit(told[1]))


def _is_commit(revision: str | None) -> bool:
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))
