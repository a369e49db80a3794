"""Grid files: what a person writes, and the runs that it means.

    grid = read_grid("data/grids/w_s.yaml")
    plan = make_plan(grid, "results/w_s")  # plan.jobs, each with the name of its folder

`GridFile` is what may stand in a grid file; README.md, "Grids of runs", says it in words.
"""

# ruff: noqa: RUF009 (`_entry` makes a field, as `dataclasses.field` does)

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch

from sude_lab.config import EMBEDDED, CompleteConfig, TuningConfig, fields_of
from sude_lab.errors import UserError
from sude_lab.evaluate.dreambench import load_dreambench
from sude_lab.evaluate.evaluate import FOLDER, prompts_of, settings_and_variants, subject_name
from sude_lab.io.opening import backbone_identity, read_facts
from sude_lab.io.pictures import load_picture, open_picture
from sude_lab.io.reading import digest, hash_of, is_file, read_text, read_yaml
from sude_lab.methods import configure
from sude_lab.runs.strength import Strength
from sude_lab.world import subjects as study
from sude_lab.world.drawing import Scene
from sude_lab.world.oracle import drawn_judge

MOST_RUNS = 100_000
T = TypeVar("T")

# --- what may stand in a grid file ---------------------------------------------------------------


def _entry(default: Any = None, *, least: float | None = None, says: Sequence[str] = ()) -> Any:
    """Return a key of a grid: its default, its least number, the tuning settings it stands for."""
    about = {"least": least, "says": says}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


class _Checked:
    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, least = getattr(self, f.name), f.metadata.get("least")
            if isinstance(value, str) and "\0" in value:
                raise UserError(f"{f.name} cannot be {value!r}: it takes a text.")
            if least is None or value is None:
                continue
            if not least <= value <= 2**32:
                text = f"{f.name} cannot be {value!r}"
                raise UserError(f"{text}: it takes a number, at least {least}.")


@dataclass
class Uses(_Checked):
    """Uses of SuDe: the product of these lists; a mapping of `also` gives more of them."""

    w_s: list[Any] = _entry(["x1"], says=("weight_sude",))
    truncation: list[Any] = _entry([True], says=("truncate", "truncate_at"))
    prior: list[str | None] = _entry([None], says=("prior",))
    weighting: list[str | None] = _entry([None], says=("weighting",))


@dataclass
class Asked(_Checked):
    """Arguments of `evaluate`; what is not said keeps its default there."""

    references: str | None = None
    structure: str | None = None
    seed: int | None = _entry(least=0)
    metrics: list[str] = _entry([])
    encoders: list[str] = _entry([])
    num_inference_steps: int | None = _entry(least=1)
    guidance_scale: float | None = _entry(least=-(2**32))
    negative_prompt: str | None = None


@dataclass
class GridFile(Uses):
    """All keys of a grid file."""

    subjects: list[Any] = _entry([], says=("image", "category"))
    methods: list[str] = _entry(["dreambooth"], says=("method",))
    seeds: list[int] = _entry([0], says=("seed",))
    backbone: list[str] = _entry([EMBEDDED], says=("backbone",))
    settings: list[Any] = _entry([{}])
    also: list[Uses] = _entry([])
    strengths: list[Any] = _entry([{}])
    """How strongly each run is drawn: mappings of lists, of the fields of `Strength`."""
    prompts: list[str] = _entry(["attributes"])
    pictures: int = _entry(4, least=1)
    evaluate: Asked = field(default_factory=Asked)
    num_gpus: float | None = _entry(least=0)
    """What a run takes of a cluster's GPUs; None: one where this machine has a card."""

    def variants(self) -> Iterator[dict[str, Any]]:
        """Yield its uses of SuDe: settings, and `factor` for a w_s of the kind x2."""
        for uses in (self, *self.also):
            axes = (uses.w_s, uses.truncation, uses.prior, uses.weighting)
            for w_s, truncation, prior, weighting in _product(axes):
                sude = {"prior": prior, "weighting": weighting}
                yield sude | _weight(w_s) | _truncation(truncation)


@dataclass
class _Listed(_Checked):
    """A mapping of `subjects`: a picture, or subjects of DreamBench."""

    picture: str = ""
    category: str = ""
    references: str | None = None
    dreambench: str = ""
    names: list[str] = _entry([])


_SAID = {name: f.name for f in fields(GridFile) for name in f.metadata.get("says", ())}
"""Field of `TuningConfig` -> the key of the grid that says it; `settings` may say all others."""


@cache
def _axes_kind(kind: Any) -> type[Any]:
    """Return a dataclass of lists, one for each field of `kind` that no key of the grid says."""
    hints = get_type_hints(kind)
    axes = [(n, list.__class_getitem__(hint)) for n, hint in hints.items() if n not in _SAID]
    return make_dataclass("settings", [(*axis, _entry([])) for axis in axes], bases=(_Checked,))


def _filled(kind: type[T], content: Any, where: str = "") -> T:
    """Return what a file says as a dataclass: typed, all keys known, the others as usual."""
    from omegaconf import OmegaConf

    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), _with_lists(kind, content, where))
        filled: Any = OmegaConf.to_object(merged)
    except UserError:
        raise
    except Exception as error:  # OmegaConf's, and those of numbers that are too long
        place = ".".join(filter(None, (where, str(getattr(error, "full_key", None) or ""))))
        raise UserError(f"{place or 'the grid'}: {str(error).splitlines()[0]}.") from error
    return filled


def _with_lists(kind: type[Any], content: Any, where: str) -> dict[str, Any]:
    """Return a mapping in which what stands alone for a list is one."""
    if not isinstance(content, dict):
        keys = ", ".join(f.name for f in fields(kind))
        raise UserError(f"{where or 'the grid'} must be a mapping, with keys among {keys}.")
    hints, whole = get_type_hints(kind), {}
    for name, value in content.items():
        hint = hints.get(name)
        (inner,) = get_args(hint) if get_origin(hint) is list else (None,)
        if get_origin(inner) is tuple and isinstance(value, list):
            value = tuple(value)
        if inner is not None and not isinstance(value, list):
            value = [value]
        if value == []:
            raise UserError(f"{name}: the list is empty, so there is nothing to run.")
        if is_dataclass(hint):
            value = _with_lists(hint, value, name)  # type: ignore[arg-type]
        elif is_dataclass(inner):
            value = [_with_lists(inner, part, name) for part in value]  # type: ignore[arg-type]
        whole[name] = value
    return whole


# --- a grid, read --------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridSubject:
    """Whom to tune on: a picture file, or a drawn subject whose picture is `png`."""

    name: str
    category: str
    image: Path | None = None
    png: bytes = b""
    scene: Scene | None = None
    references: Path | None = None


def read_grid(path: Path | str) -> GridFile:
    """Read a grid file (YAML); its entries are read, too: `GridSubject`, settings, `Strength`."""
    what = f"The grid {path}"
    content = read_yaml(read_text(path, what, "a YAML file"), what)
    try:
        return grid_of(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def grid_of(content: Any) -> GridFile:
    """Return the grid that the content of a file is."""
    if "${" in repr(content):  # OmegaConf would put the environment's variables in
        raise UserError("a grid has no ${...}: write the value out.")
    grid = _filled(GridFile, content)
    if not grid.subjects:
        raise UserError("the grid names no `subjects`: write for example - held-out 0 1 2.")
    grid.subjects = list(chain(*map(_subjects, grid.subjects)))
    names = [s.name for s in grid.subjects]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"two subjects are named {twice[0]}: name one, or rename its picture.")
    grid.prompts = [str(Path(p).absolute()) if is_file(p) else p for p in grid.prompts]
    if grid.num_gpus is None:
        grid.num_gpus = float(torch.cuda.is_available())
    grid.settings = list(chain(*map(_settings, grid.settings)))
    drawn = (_choices(Strength, content, "strengths") for content in grid.strengths)
    grid.strengths = list(dict.fromkeys(Strength(**values) for values in chain(*drawn)))
    list(grid.variants())  # says what is wrong with them
    return grid


def _product(axes: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Return the product of lists; it must be one that can ever be run."""
    number = math.prod(map(len, axes))
    if number > MOST_RUNS:
        raise UserError(f"the lists mean {number:,} runs: a grid has at most {MOST_RUNS:,}.")
    return product(*axes)


def _subjects(entry: Any) -> Iterator[GridSubject]:
    """Read one entry of `subjects`; it may stand for several."""
    if isinstance(entry, str):
        drawn = re.fullmatch(r"\s*(development|held-out|demo)((?:\s+[0-9]{1,9})+)\s*", entry)
        if not drawn:
            raise UserError(
                f"subjects: {entry!r} is no drawn subject: write held-out (or development, demo) "
                "and numbers, or a mapping with picture and category, or with dreambench."
            )
        for number in drawn[2].split():
            who, png = study.subject(drawn[1], int(number)), io.BytesIO()
            who.picture.save(png, format="png")
            yield GridSubject(who.name, who.scene.category, None, png.getvalue(), who.scene)
        return
    listed = _filled(_Listed, entry, "subjects")
    if listed.dreambench:
        bench = load_dreambench(Path(listed.dreambench).absolute())
        for one in (bench.subject(n) for n in listed.names or bench.subjects):
            yield GridSubject(one.name, one.category, one.picture, references=bench.folder)
    elif not listed.picture or not listed.category:
        raise UserError(f"subjects: {entry!r} needs a picture and a category.")
    else:
        image = Path(listed.picture).absolute()
        load_picture(image, resolution=64)  # says what is wrong with it
        references = Path(listed.references).absolute() if listed.references else None
        name = subject_name(TuningConfig(image, listed.category))
        category = " ".join(listed.category.split())
        yield GridSubject(name, category, image, references=references)


def _weight(value: Any) -> dict[str, Any]:
    times = isinstance(value, str) and value.startswith("x")
    try:
        number = float(value[1:] if times else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise UserError(f"w_s cannot be {value!r}: write a number, or x2 for twice the usual one.")
    return {"factor" if times else "weight_sude": number}


def _truncation(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"truncate": value}
    if isinstance(value, int | float):
        return {"truncate_at": float(value)}
    raise UserError(f"truncation cannot be {value!r}: write on, off, or the rho to stop at.")


def _settings(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the product of one mapping of `settings`, with whole paths."""
    for name in content if isinstance(content, dict) else ():
        if name in _SAID:
            raise UserError(f"settings: {name} is what the grid's key {_SAID[name]} says.")
    for values in _choices(TuningConfig, content, "settings"):
        yield {n: x.absolute() if isinstance(x, Path) else x for n, x in values.items()}


def _choices(kind: Any, content: Any, where: str) -> Iterator[dict[str, Any]]:
    """Yield the product of one mapping: a list is an axis."""
    axes = _filled(_axes_kind(kind), content, where)
    for values in _product([getattr(axes, name) for name in content]):
        yield dict(zip(content, values, strict=True))


# --- the runs of a grid --------------------------------------------------------------------------


LABEL: dict[str, type] = dict.fromkeys(
    ("run", "subject", "category", "method", "backbone", "settings", "variant"), str
) | {"tuning_seed": int, "w_s": float, "w_s_factor": float, "truncate": bool, "truncate_at": float}
LABEL |= {"prior": str, "weighting": str, "steps": int}
"""What the table of results says of a run beside its scores, its first columns; w_s_factor: w_s in
units of the method's own."""
SCORE: dict[str, type] = {"open_gates": float, "rho": float, "strength": str, "number": int}
SCORE |= dict.fromkeys(("kind", "prompt", "caption", "attribute", "background"), str)
SCORE |= {"seed": int, "picture": int, "metric": str, "encoder": str, "value": float}
"""What it says of a picture."""


@dataclass(frozen=True)
class Job:
    """One run of a grid, and how it is judged."""

    key: str
    config: CompleteConfig
    label: dict[str, Any]
    """Its values of `LABEL`."""
    scene: Scene | None
    asked: dict[str, Any]
    """Arguments of `evaluate`."""
    strengths: tuple[Strength, ...]
    """How strongly it is drawn."""
    rows: str
    """Name of the file of its scores: a hash of all that is asked."""
    pictures: int

    def scores(self, runs: Path) -> Path:
        """Return the file of its scores, whose presence says that it is finished."""
        return runs / self.key / FOLDER / self.rows


@dataclass(frozen=True)
class Plan:
    """All runs of a grid, and where they are."""

    grid: GridFile
    out: Path
    runs: Path
    jobs: tuple[Job, ...]
    num_equal: int
    """How many more the lists name that are equal to one of these."""


def make_plan(grid: GridFile, out: Path | str, runs: Path | str | None = None) -> Plan:
    """List the runs of a grid; nothing is written, and no model is opened.

    Order: backbone, seed, subject, method, settings, then `also` after w_s, truncation, prior,
    weighting; what is named last changes fastest. Equal runs are one: without SuDe (w_s 0) its
    other settings say nothing. The runs are in the folder `runs`, None: OUT/runs.
    """
    out = Path(os.path.abspath(out))
    judged = {k: v for k, v in asdict(grid.evaluate).items() if v not in (None, [])}
    judged |= {"prompts": grid.prompts, "num_images": grid.pictures}
    contents = [digest(Path(p)) if is_file(p) else p for p in grid.prompts]
    digests = {s.name: digest(s.image or s.png) for s in grid.subjects}
    jobs: dict[str, Job] = {}
    counts: dict[Any, int] = {}
    total = 0
    axes = (grid.backbone, grid.seeds, grid.subjects, grid.methods, grid.settings)
    for backbone, seed, who, method, settings, variant in _product((*axes, [*grid.variants()])):
        total += 1
        image = who.image or out / "subjects" / f"{who.name}.png"
        about = {"image": image, "category": who.category, "method": method, "seed": seed}
        config, usual = _config(settings | variant | about | {"backbone": backbone})
        key = run_key(config, digests[who.name])
        if key in jobs:
            continue
        # Runs of one seed are drawn from the same noise, those of another from fresh.
        asks = judged | {"seed": judged.get("seed", 0) + seed}
        if who.references:
            asks["references"] = str(who.references)
        references = Path(asks["references"]) if "references" in asks else None
        kind = (who.name, method, backbone, config.prompt, config.more_subjects)
        if kind not in counts:
            seen = map(open_picture, (config.image,))  # opened where it is looked at
            judge = drawn_judge(config, seen, scene=who.scene)
            how = {"structure": asks.get("structure", "default"), "references": references}
            counts[kind] = len(prompts_of(config, grid.prompts, judge, **how))
        strengths = tuple(dict.fromkeys(_of_run(s, config) for s in grid.strengths))
        rows_of: list[Any] = [asks | {"prompts": contents}, repr(who.scene)]
        rows_of += [list(map(str, strengths))] if strengths != (Strength(),) else []
        rows = f"rows-{hash_of(rows_of)[:10]}.parquet"
        pictures = counts[kind] * grid.pictures * len(strengths)
        label = _label(key, who.name, config, usual)
        jobs[key] = Job(key, config, label, who.scene, asks, strengths, rows, pictures)
    names = settings_and_variants([job.config for job in jobs.values()])
    for job, (general, sude) in zip(jobs.values(), names, strict=True):
        job.label.update(settings=general, variant=sude)
    where = Path(os.path.abspath(runs)) if runs is not None else out / "runs"
    return Plan(grid, out, where, tuple(jobs.values()), total - len(jobs))


def _of_run(strength: Strength, config: CompleteConfig) -> Strength:
    """Return a strength for a run: its last step needs no kept weights."""
    step, last = strength.step or 0, config.max_train_steps
    if step > last:
        raise UserError(f"strengths: step {step} is asked for, and the run has {last} steps.")
    return replace(strength, step=None) if step == last else strength


def _label(key: str, subject: str, config: CompleteConfig, usual: float) -> dict[str, Any]:
    shared = LABEL.keys() & {f.name for f in fields(config)}
    return {name: getattr(config, name) for name in shared} | {
        **{"run": key, "subject": subject, "tuning_seed": config.seed},
        **{"w_s": config.weight_sude, "steps": config.max_train_steps},
        "w_s_factor": config.weight_sude / usual if usual else None,
    }


def _config(settings: dict[str, Any]) -> tuple[CompleteConfig, float]:
    """Return the configuration with its defaults filled in, and the method's own w_s."""
    facts = read_facts(settings["backbone"])
    names = ("image", "category", "backbone", "method")
    usual = configure({name: settings[name] for name in names}, facts)
    factor = settings.pop("factor", 1.0)
    settings.setdefault("weight_sude", usual.weight_sude * factor)
    config = configure(settings, facts)
    silent = set() if config.with_sude else {*fields_of("sude"), "regularizer_file"}
    silent |= set() if config.truncate else {"truncate_at"}
    silent |= set() if config.prior_loss_weight else {"class_images"}
    unsaid = {name: getattr(usual, name) for name in silent - {"weight_sude"}}
    return replace(config, **unsaid), usual.weight_sude


def kind_of(config: CompleteConfig) -> str:
    """Name what a step's time depends on: model, method, what is trained, SuDe, batch, side."""
    size = config.train_batch_size * config.gradient_accumulation_steps
    own = config.regularizer_file
    sude = (own.name if own else "SuDe") if config.with_sude else "plain"
    train = f" {config.train}" if config.method == "dreambooth" else ""
    side = f", {config.resolution} px" if config.resolution else ""
    return f"{Path(config.backbone).name}, {config.method}{train}, {sude}, batch {size}{side}"


def run_key(config: CompleteConfig, picture: str) -> str:
    """Name a run by what it is: not by where its files lie, nor by the device it runs on.

    `picture`: the digest of its first subject's.
    """
    where = fields_of("place")
    # A field at its (first) default says nothing: later fields and defaults leave the names alone.
    silent = {f.name: f.default for f in fields(TuningConfig)} | {"optimizer": "adamw"}
    about = {
        f.name: getattr(config, f.name)
        for f in fields(TuningConfig)
        if f.name not in where and getattr(config, f.name) != silent[f.name]
    }
    others = [(s.category, s.token, digest(s.image)) for s in config.subjects[1:]]
    own: list[Any] = []
    if (mine := config.class_images) is not None:  # the folder's files, and its categories'
        folders = {mine, *(mine / s.category for s in config.subjects)}
        files = sorted(p for folder in folders for p in folder.glob("*") if p.is_file())
        own = list(map(digest, files))
    if config.regularizer_file is not None:
        own.append({"regularizer": digest(config.regularizer_file)})
    model = backbone_identity(config.backbone) or config.backbone
    return hash_of([about, picture, others, own, model])[:16]
