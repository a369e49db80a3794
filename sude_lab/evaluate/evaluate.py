"""Draw what runs were asked for, measure it as the paper does, and compare the runs in pairs.

    RUN/evaluation/pictures/<prompt>/seed-0/000.png   drawn once, and never again
    RUN/evaluation/scores.csv                         a row a picture and metric
    OUT/scores.csv, table.csv, table.md               the runs together, compared in pairs

The same command continues where it was stopped. Pictures are addressed by all that makes them (the
run, prompt, sampler and seed): another command draws only what it lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.errors import UserError
from sude_lab.evaluate import metrics as m
from sude_lab.evaluate.dreambench import (
    attributes_of,
    backgrounds,
    find_dreambench,
    load_dreambench,
    pictures_in,
)
from sude_lab.evaluate.encoders import ENCODERS, Encoder, open_encoder
from sude_lab.generation import MOST, generate, sampling_settings
from sude_lab.io.files import atomic_write, require_own
from sude_lab.io.opening import read_facts, resolve_source
from sude_lab.io.pictures import open_picture
from sude_lab.io.reading import is_file
from sude_lab.methods import get_method
from sude_lab.prompts import Prompt, ask, read_prompts, structured
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run
from sude_lab.tuning import TuningConfig
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, Oracle, judge, load_oracle, read_scene

FOLDER, PICTURES = "evaluation", "pictures"
SCORES, TABLE, REPORT = "scores.csv", "table.csv", "table.md"
PROMPT_SETS = ("attributes", "plain", "backgrounds", "combinations", "dreambench")

ORACLE = "oracle"
LEARNED: dict[str, tuple[str, bool]] = {
    "CLIP-I": ("clip", False),
    "CLIP-T": ("clip", True),
    "DINO-I": ("dino", False),
    "BLIP-T": ("blip", True),
    "CLIP-L-I": ("clip-large", False),
    "CLIP-L-T": ("clip-large", True),
    "DINOv2-I": ("dinov2", False),
}
"""Metric -> its encoder, and whether it compares with a text (else with the references)."""
PAPERS = ("CLIP-I", "CLIP-T", "DINO-I", "BLIP-T")

_SUDE = (
    *("weight_sude", "prior", "weighting", "truncate", "truncate_at", "monitor_sude"),
    *("prior_bank", "prior_bank_dtype"),
)
_NOT_SETTINGS = (
    *("image", "category", "token", "more_subjects", "initializer", "class_images"),
    *("method", "backbone", "seed", "device", "dtype", *_SUDE),
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found and wrote."""

    out: Path
    scores: pd.DataFrame
    """A row a picture and metric."""
    table: pd.DataFrame
    """The rows of `metrics.compare`."""
    text: str
    """The table for people, as in table.md."""


@dataclass(frozen=True)
class _Job:
    """One run, and everything that is to be drawn and measured of it."""

    run: Run
    label: dict[str, Any]
    prompts: list[Prompt]
    references: list[Image.Image]
    metrics: tuple[str, ...]
    scene: world.Scene | None
    sampling: dict[str, Any]
    negative_prompt: str | None
    load: Callable[[Run], Backbone]

    @property
    def folder(self) -> Path:
        return self.run.folder / FOLDER


def evaluate(
    runs: Sequence[Path | str],
    *,
    out: Path | str | None = None,
    references: Path | str | None = None,
    prompts: Sequence[str] = ("attributes",),
    structure: str = "default",
    num_images: int = 4,
    num_seeds: int = 1,
    seed: int = 0,
    metrics: Sequence[str] = (),
    encoders: Sequence[str] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    device: str = "auto",
    progress: bool = True,
    scene: world.Scene | None = None,
    load: Callable[[Run], Backbone] | None = None,
    opened_encoders: dict[str, Encoder] | None = None,
) -> Evaluation:
    """Draw what is missing of the runs' pictures, measure all of them, and write the tables.

    Args:
        runs: Folders of finished runs.
        out: Folder of the common tables; None: that of the one run, RUN/evaluation.
        references: Pictures of the subject; a folder with such a folder for every subject; or
            DreamBench. None: the picture that the run was tuned on.
        prompts: Names of `PROMPT_SETS` and files (see `prompts.read_prompts`).
        structure: default (the method's own template), P1, P2 or P3; for our own sets.
        num_images: Pictures a prompt and seed.
        num_seeds: Seeds of drawing, `seed`, `seed + 1`, ...
        seed: The first of them.
        metrics: Names of `LEARNED`, or oracle. None: the paper's four; in the drawn world the
            oracle, and what the encoders that are named can measure.
        encoders: Folders in place of the pinned encoders: "clip=FOLDER", ...
        num_inference_steps, guidance_scale, negative_prompt: The sampler's; None: the model's own.
        device: auto, cpu, cuda, ...
        progress: Whether to show bars.
        scene: What the subject's picture shows, where it is known; None: in the drawn world the
            oracle reads it from the references.
        load: Opens a run's model; None: `Run.load`.
        opened_encoders: Encoders by name, to be used and added to; None: they are opened anew.

    Raises:
        UserError: bad input, or an encoder that cannot be had (nothing is drawn or written then);
            or a run that cannot be opened (what was computed before stays).
    """
    if num_images < 1 or num_seeds < 1:
        raise UserError("--num-images and --num-seeds must be at least 1.")
    if num_images * num_seeds > MOST:
        raise UserError(
            f"{num_images * num_seeds:,} pictures of every prompt are asked for: --num-images "
            f"times --num-seeds must be at most {MOST:,}."
        )
    if not 0 <= seed <= 2**32 - num_seeds:
        raise UserError(f"The seed is {seed}: it must lie between 0 and {2**32 - num_seeds}.")
    if not runs:
        raise UserError("Name at least one run: the --out folder of `sude-lab tune`.")
    if len(runs) > 1 and out is None:
        raise UserError("Name a folder for the tables of several runs with --out.")
    opened = [Run.open(folder) for folder in runs]
    target = Path(out) if out is not None else opened[0].folder / FOLDER
    if target.is_file():
        raise UserError(f"{target} is a file: --out takes a folder.")
    require_own(target, SCORES, "run,settings,", (TABLE, REPORT))
    named = _named_encoders(encoders)
    oracle = load_oracle() if any(_is_drawn(run.config) for run in opened) else None
    labels = _labels(opened)
    several = len({label["subject"] for label in labels}) > 1
    folder = None if references is None else Path(references)
    sampler = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    jobs = []
    for run, label in zip(opened, labels, strict=True):
        images = _references(run, folder, several)
        shown = scene or _scene(run, images, oracle)
        jobs.append(
            _Job(
                run,
                label,
                _asked(run, prompts, structure, folder, shown),
                images,
                _chosen_metrics(metrics, run.config, named),
                shown,
                sampling_settings(read_facts(run.config.backbone), **sampler),
                negative_prompt,
                load or (lambda run: run.load(device)),
            )
        )
    needed = {LEARNED[name][0] for job in jobs for name in job.metrics if name in LEARNED}
    # Before anything is drawn: whoever waits for an hour should not learn then that one is missing.
    ready = {} if opened_encoders is None else opened_encoders
    for name in ENCODERS:
        if name in needed and name not in ready:
            ready[name] = open_encoder(name, named.get(name), device=device)
    seeds = range(seed, seed + num_seeds)
    tables = []
    for job in jobs:
        pictures = _drawn(job, seeds, num_images, progress)
        table = _scored(job, pictures, ready, oracle, progress)
        _write(job.folder / SCORES, table)
        tables.append(table)
    scores = pd.concat(tables, ignore_index=True)
    table = m.compare(scores)
    text = report(table, scores)
    _write(target / SCORES, scores)
    _write(target / TABLE, table.round(5))
    with atomic_write(target / REPORT) as path:
        path.write_text(text, encoding="utf-8")
    return Evaluation(target, scores, table, text)


# --- what is asked for ---------------------------------------------------------------------------


def _is_drawn(config: TuningConfig) -> bool:
    """Whether the run was tuned on the embedded model, whose world the oracle knows."""
    return resolve_source(config.backbone) == resolve_source(EMBEDDED)


def _named_encoders(encoders: Sequence[str]) -> dict[str, str]:
    named = {}
    for text in encoders:
        name, _, folder = text.partition("=")
        if name not in ENCODERS or not folder:
            raise UserError(
                f"--encoders {text!r} must read NAME=FOLDER with a name among "
                f"{', '.join(ENCODERS)}."
            )
        named[name] = folder
    return named


def _chosen_metrics(
    names: Sequence[str], config: TuningConfig, named: dict[str, str]
) -> tuple[str, ...]:
    known = {name.lower(): name for name in (ORACLE, *LEARNED)}
    wrong = [name for name in names if name.lower() not in known]
    if wrong:
        raise UserError(f"There is no metric {wrong[0]!r}: choose {', '.join(known.values())}.")
    drawn = _is_drawn(config)
    if not names:
        mine = tuple(name for name, (encoder, _) in LEARNED.items() if encoder in named)
        return (ORACLE, *mine) if drawn else PAPERS
    chosen = tuple(dict.fromkeys(known[name.lower()] for name in names))
    if ORACLE in chosen and not drawn:
        raise UserError(
            f"The oracle knows the drawn world alone, and a run on {config.backbone} draws another "
            "one: choose other --metrics."
        )
    return chosen


def _labels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Name each run by what sets it apart from the others of its method.

    Raises:
        UserError: two runs cannot be told apart.
    """
    labels: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    names = settings_and_variants([run.config for run in runs])
    for run, (settings, variant) in zip(runs, names, strict=True):
        config = run.config
        # Pictures of two subjects may have one name, the copies of one picture several.
        name = subject_name(config)
        digest = hashlib.sha256(run.picture().tobytes()).hexdigest()
        if digests.setdefault(name, digest) != digest:
            name = f"{name}-{digest[:6]}"
        label = {
            "run": str(run.folder),
            "settings": settings,
            "variant": variant,
            "method": config.method,
            "weight_sude": config.weight_sude,
            "category": config.category,
            "subject": name,
            "tuning_seed": config.seed,
        }
        for other in labels:
            if all(other[k] == v for k, v in label.items() if k != "run"):
                raise UserError(
                    f"{other['run']} and {run.folder} are runs of the same settings, subject and "
                    "seed: give one of them."
                )
        labels.append(label)
    return labels


def settings_and_variants(configs: Sequence[TuningConfig]) -> list[tuple[str, str]]:
    """Name each configuration by what sets it apart: its method's settings, and its use of SuDe.

    ("dreambooth, lora_rank 4", "SuDe, weight_sude 2.0"), or "plain" for the latter; only what
    differs within a method is named.
    """
    general: dict[str, list[str]] = {}
    steered: dict[str, list[str]] = {}
    for method in dict.fromkeys(c.method for c in configs):
        family = [c for c in configs if c.method == method]
        names = [f.name for f in fields(TuningConfig)]
        general[method] = _varying(family, [n for n in names if n not in _NOT_SETTINGS])
        # Where plain runs were tuned with several banks, each is compared with its own kind.
        general[method] += _varying([c for c in family if not c.weight_sude], ["prior_bank"])
        names = [n for n in _SUDE if n not in general[method]]
        steered[method] = _varying([c for c in family if c.weight_sude], names)
    several = len({c.backbone for c in configs}) > 1
    found = []
    for c in configs:
        settings = [c.method, *(f"{n} {getattr(c, n)}" for n in general[c.method])]
        if several:
            settings.append(Path(c.backbone).name)
        sude = ["SuDe", *(f"{n} {getattr(c, n)}" for n in steered[c.method])]
        found.append((", ".join(settings), ", ".join(sude) if c.weight_sude else "plain"))
    return found


def _varying(configs: Sequence[TuningConfig], names: Sequence[str]) -> list[str]:
    return [n for n in names if len({str(getattr(c, n)) for c in configs}) > 1]


def subject_name(config: TuningConfig) -> str:
    """Return the name of a run's subject: its picture's, or the folder's of a numbered one.

    "rex" for rex.jpg, "dog" for dog/00.jpg.
    """
    stem, folder = config.image.stem, config.image.parent.name
    return folder if stem.isdigit() and folder else stem


def _asked(
    run: Run,
    names: Sequence[str],
    structure: str,
    references: Path | None,
    scene: world.Scene | None,
) -> list[Prompt]:
    if structure != "default":
        structured(structure, run.config.category)  # says so where there is no such structure
    asked: list[Prompt] = []
    for name in names:
        asked += _prompt_set(name, run, references, structure, scene)
    if not asked:
        raise UserError(f"Name prompts with --prompts: {', '.join(PROMPT_SETS)}, or a file.")
    for prompt in asked:
        run.prompt(prompt.text)  # says so where a subject is asked for that the run does not have
    return list(dict.fromkeys(asked))


def prompts_of(
    config: TuningConfig,
    prompts: Sequence[str],
    *,
    structure: str = "default",
    references: Path | None = None,
    scene: world.Scene | None = None,
) -> list[Prompt]:
    """Return what `evaluate` will ask of a run with this configuration, before there is one.

    In the drawn world without a known `scene` the oracle reads it from the picture, as `evaluate`
    does.

    Raises:
        UserError: there are no such prompts, or none for this category.
    """
    run = Run(config.image, config)
    if scene is None and _is_drawn(config):
        scene = _scene(run, [open_picture(config.image)], load_oracle())
    return _asked(run, prompts, structure, references, scene)


def _scene(run: Run, images: list[Image.Image], oracle: Oracle | None) -> world.Scene | None:
    """Return what the oracle reads from the references of a run in the drawn world."""
    if oracle is None or not _is_drawn(run.config):
        return None
    category = run.config.category
    if category not in world.ATTRIBUTES:
        raise UserError(
            f"The oracle does not know the category {category!r} of {run.folder}: it knows "
            f"{', '.join(world.CATEGORIES)}."
        )
    return read_scene(oracle, images, category)


def _references(run: Run, folder: Path | None, several: bool) -> list[Image.Image]:
    """Return the references of a run; `several`: whether the runs are of more than one subject."""
    if folder is None:
        return [run.picture()]
    name = subject_name(run.config)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --references takes one with pictures.")
    if find_dreambench(folder):
        paths = load_dreambench(folder).subject(name).images
    elif (folder / name).is_dir():
        paths = pictures_in(folder / name)
        if not paths:
            raise UserError(f"There are no pictures in {folder / name}: put some there.")
    else:
        paths = pictures_in(folder)
        if not paths:
            there = [p.name for p in folder.iterdir() if p.is_dir()]
            close = get_close_matches(name, there, n=1)
            hint = f"is it {close[0]}?" if close else "put some there."
            raise UserError(f"{folder} has neither pictures nor a folder {name} of them: {hint}")
        if several:
            raise UserError(
                f"The pictures in {folder} are of one subject, the runs of several: put those of "
                f"each in a folder of its name ({name}, ...)."
            )
    return [open_picture(path) for path in paths]


def _prompt_set(
    name: str, run: Run, references: Path | None, structure: str, scene: world.Scene | None
) -> list[Prompt]:
    config = run.config
    category = config.category
    if name == "dreambench":
        if references is None or find_dreambench(references) is None:
            raise UserError("--prompts dreambench needs the data set: name it with --references.")
        bench = load_dreambench(references)
        return bench.prompts(bench.subject(subject_name(config)))
    if name not in PROMPT_SETS:
        if not is_file(name):
            raise UserError(
                f"There is no file {name[:200]!r} and no prompts of that name: choose "
                f"{', '.join(PROMPT_SETS)}, or name a file."
            )
        return read_prompts(Path(name), *(s.category for s in config.subjects))
    template = config.prompt or get_method(config.method).template
    form = "" if structure == "default" else structure
    attributes: tuple[str, ...] = ("",)
    places: tuple[str, ...] = ("",)
    if name in ("attributes", "combinations"):
        # What the one picture shows is no test of what the category can do.
        attributes = (
            tuple(a for a in world.ATTRIBUTES[category] if a != scene.attribute)
            if scene
            else attributes_of(category)
        )
    if name in ("backgrounds", "combinations"):
        places = tuple(world.BACKGROUNDS.values()) if scene else backgrounds()
    return [ask(template, category, a, b, structure=form) for a in attributes for b in places]


# --- drawing -------------------------------------------------------------------------------------


def _picture_folder(job: _Job, prompt: Prompt, seed: int) -> Path:
    # What a run is follows from its settings and its end: a new run in an old folder is another.
    made = b"".join((job.run.folder / n).read_bytes() for n in (CONFIG, ENVIRONMENT))
    about = {
        "run": hashlib.sha256(made).hexdigest()[:16],
        "prompt": job.run.prompt(prompt.text),
        "negative_prompt": job.negative_prompt,
        "sampling": job.sampling,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
    slug = re.sub(r"\W+", "-", prompt.text.replace("{S*}", "S"))[:48].strip("-")
    return job.folder / PICTURES / f"{slug}-{name}" / f"seed-{seed}"


def _read(path: Path) -> Image.Image | None:
    try:
        return open_picture(path)
    except UserError:  # not there, or cut short by a power cut: it is drawn
        return None


@dataclass(frozen=True)
class _Picture:
    prompt: int
    seed: int
    number: int
    path: Path
    image: Image.Image


def _drawn(
    job: _Job, seeds: range, num_images: int, progress: bool, batch_size: int = 8
) -> list[_Picture]:
    """Return all pictures of a run in order, after drawing those that are missing."""
    places = [
        (n, seed, k, _picture_folder(job, prompt, seed) / f"{k:03d}.png")
        for n, prompt in enumerate(job.prompts)
        for seed in seeds
        for k in range(num_images)
    ]
    found = {path: _read(path) for *_, path in places}
    missing = list({place[3]: place for place in places if found[place[3]] is None}.values())
    if missing:
        backbone = job.load(job.run)
        for prompt in job.prompts:
            backbone.beyond_reach(job.run.prompt(prompt.text), *job.run.tokens)
        _mention_unknown_words(backbone, job)
        bar = tqdm(
            total=len(missing),
            desc=f"drawing, {job.label['variant']}",
            unit="picture",
            disable=not progress,
        )
        with bar:
            for _, rest in groupby(missing, key=lambda place: place[:2]):
                batch = list(rest)
                while batch:
                    batch = batch[_draw_some(job, backbone, batch, found, batch_size, bar) :]
        del backbone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    pictures = []
    for n, seed, k, path in places:
        image = found[path]
        assert image is not None  # read or drawn
        pictures.append(_Picture(n, seed, k, path, image))
    return pictures


def _draw_some(
    job: _Job,
    backbone: Backbone,
    places: list[tuple[int, int, int, Path]],
    found: dict[Path, Image.Image | None],
    batch_size: int,
    bar: Any,
) -> int:
    """Draw and keep the first places of one prompt and seed whose numbers follow each other."""
    n, seed, first, _ = places[0]
    follow = [p for i, p in enumerate(places[:batch_size]) if p[2] == first + i]
    images = generate(
        backbone,
        job.run.prompt(job.prompts[n].text),
        num_images=len(follow),
        first=first,
        seed=seed,
        negative_prompt=job.negative_prompt,
        batch_size=batch_size,
        **job.sampling,
    )
    for (*_, path), image in zip(follow, images, strict=True):
        with atomic_write(path) as file:
            image.save(file)
        found[path] = image
        bar.update()
    return len(follow)


def _mention_unknown_words(backbone: Backbone, job: _Job) -> None:
    words = dict.fromkeys(w for p in job.prompts for w in backbone.unknown_words(p.text))
    if words:
        told = ", ".join(map(repr, list(words)[:8])) + (", ..." if len(words) > 8 else "")
        tqdm.write(f"The model of {job.run.folder} has never met {told}.", file=sys.stderr)


# --- measuring -----------------------------------------------------------------------------------


def _scored(
    job: _Job,
    pictures: list[_Picture],
    encoders: dict[str, Encoder],
    oracle: Oracle | None,
    progress: bool,
) -> pd.DataFrame:
    """Return the run's scores, a row a picture and metric."""
    images = [p.image for p in pictures]
    columns: dict[str, Any] = {}
    for name in job.metrics:
        if name in LEARNED:
            encoder, compares_text = LEARNED[name]
            reader = encoders[encoder]
            features = reader.images(images, progress=progress).numpy()
            if compares_text:
                texts = reader.texts([job.prompts[p.prompt].caption for p in pictures]).numpy()
                values = m.text_similarity(features, texts)
            else:
                values = m.image_similarity(features, reader.images(job.references).numpy())
            columns[name] = (reader.identity, values)
    if ORACLE in job.metrics:
        assert oracle is not None and job.scene is not None
        columns |= _oracle_columns(oracle, job, pictures, job.scene)
    rows = []
    for i, p in enumerate(pictures):
        prompt = job.prompts[p.prompt]
        about = job.label | {
            "number": p.prompt,
            "kind": prompt.kind,
            "prompt": prompt.text,
            "caption": prompt.caption,
            "attribute": prompt.attribute,
            "background": prompt.background,
            "seed": p.seed,
            "picture": p.number,
            "file": p.path.relative_to(job.run.folder).as_posix(),
        }
        for name, (encoder, values) in columns.items():
            if values[i] is not None:
                value = round(float(values[i]), 5)
                rows.append(about | {"metric": name, "encoder": encoder, "value": value})
    return pd.DataFrame(rows)


def _oracle_columns(
    oracle: Oracle, job: _Job, pictures: list[_Picture], scene: world.Scene
) -> dict[str, tuple[str, list[float | None]]]:
    """Return the oracle's measures, picture by picture; None where nothing of it was asked."""
    names = ("attribute_alignment", "background_alignment", "category_alignment")
    found: dict[str, list[float | None]] = {n: [] for n in (*names, "subject_fidelity")}
    for number, group in groupby(pictures, key=lambda p: p.prompt):
        images = [p.image for p in group]
        prompt = job.prompts[number]
        attribute = prompt.attribute or _mentioned(prompt.text, world.ATTRIBUTES[scene.category])
        if attribute not in world.ATTRIBUTES[scene.category]:
            attribute = None
        reading = judge(oracle, images, scene, attribute)
        none = [None] * len(images)
        found["category_alignment"] += reading.category_alignment.tolist()
        found["subject_fidelity"] += reading.subject_fidelity.tolist()
        found["attribute_alignment"] += reading.attribute_alignment.tolist() if attribute else none
        found["background_alignment"] += _background_alignment(oracle, images, prompt) or none
    return {name: (ORACLE, values) for name, values in found.items()}


def _background_alignment(
    oracle: Oracle, images: list[Image.Image], prompt: Prompt
) -> list[float] | None:
    """Return the probability of the background, or the companion, that was asked for."""
    for head, phrases in (("background", world.BACKGROUNDS), ("companion", world.COMPANIONS)):
        phrase = _mentioned(f"{prompt.text} {prompt.background}", tuple(phrases.values()))
        if phrase:
            name = next(k for k, v in phrases.items() if v == phrase)
            return oracle.read(images)[head][:, HEADS[head].index(name)].tolist()
    return None


def _mentioned(text: str, phrases: Sequence[str]) -> str | None:
    return next((p for p in phrases if re.search(rf"\b{re.escape(p)}\b", text)), None)


# --- telling -------------------------------------------------------------------------------------


def report(table: pd.DataFrame, scores: pd.DataFrame) -> str:
    """Return the table of `metrics.compare` for people, in Markdown, with what one must know."""
    lines = []
    keys = ["settings", "variant", "kind"]
    for (settings, variant, kind), group in table.groupby(keys, sort=False):
        line = {"settings": settings, "": variant, "prompts": kind}
        for row in group.to_dict("records"):
            line[str(row["metric"])] = _cell(row)
        line["pictures"] = str(group["pictures"].max())
        line["intervals over"] = str(group["over"].iloc[0])
        lines.append(line)
    parts = [pd.DataFrame(lines).fillna("").to_markdown(index=False, disable_numparse=True)]
    parts.append("In square brackets: 95 % bootstrap intervals.")
    if "difference" in table and table["difference"].notna().any():
        against = ", ".join(dict.fromkeys(table["against"].dropna()))
        parts.append(
            f"In parentheses: the difference to {against}, over pictures of the same subject, "
            "prompt, seed and noise."
        )
    if {LEARNED[x][0] for x in table["metric"] if x in LEARNED and LEARNED[x][1]}:
        parts.append(
            "CLIP-T and BLIP-T compare a picture with its prompt without the subject's word, which "
            "the encoders never met: the column caption of the scores."
        )
    used = scores[scores["encoder"] != ORACLE][["metric", "encoder"]].drop_duplicates()
    if len(used):
        parts.append("Encoders: " + "; ".join(f"{a}: {b}" for a, b in used.to_numpy()) + ".")
    if ORACLE in set(scores["encoder"]):
        parts.append(
            "Alignments and fidelity are the drawn world's oracle's; the look that fidelity asks "
            "for is the one that it reads from the references."
        )
    ranks = m.rank_agreement(scores)
    if len(ranks):
        parts.append("How the learned metrics rank the runs, against the oracle (Spearman's rho):")
        parts.append(ranks.round(2).to_markdown(index=False))
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[Any, Any]) -> str:
    text = f"{row['mean']:.3f}"
    if row["low"] == row["low"]:
        text += f" [{row['low']:.3f}, {row['high']:.3f}]"
    difference = row.get("difference")
    if difference is not None and difference == difference:
        text += f" ({difference:+.3f}"
        low, high = row["difference_low"], row["difference_high"]
        text += f" [{low:+.3f}, {high:+.3f}])" if low == low else ")"
    return text


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False)
