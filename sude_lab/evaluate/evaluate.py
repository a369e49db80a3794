"""Draw what runs were asked for, measure it as the paper does, and compare the runs in pairs.

    RUN/evaluation/pictures/<prompt>/seed-0/000.png   drawn once, and never again
    RUN/evaluation/scores.csv                         a row a picture and metric
    OUT/scores.csv, table.csv, table.md               the runs together, compared in pairs

The same command continues where it was stopped. Pictures are addressed by all that makes them (the
run, prompt, sampler and seed): another command draws only what it lacks.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import Environment, FileSystemLoader
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import CompleteConfig, TuningConfig, fields_of
from sude_lab.errors import UserError, check_whole, listed
from sude_lab.evaluate import metrics as m
from sude_lab.evaluate.dreambench import (
    attributes_of,
    backgrounds,
    find_dreambench,
    load_dreambench,
    pictures_in,
)
from sude_lab.evaluate.encoders import ENCODERS, Encoder, open_encoder
from sude_lab.evaluate.prompts import Prompt, prompt_for, read_prompts
from sude_lab.evaluate.statistics import Interval
from sude_lab.generation import MOST, generate, remarks, sampling_settings
from sude_lab.io.files import atomic_write, in_utf_8, require_own, write_file, write_table
from sude_lab.io.opening import read_facts
from sude_lab.io.pictures import open_picture
from sude_lab.io.reading import digest, hash_of, is_file
from sude_lab.methods import get_method
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run, filled
from sude_lab.runs.strength import guidance_for

if TYPE_CHECKING:  # a second, which drawing need not wait for
    import pandas as pd

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

BATCH = 8
"""Pictures that are drawn at once."""
_SUDE = fields_of("sude")
_NO_SETTINGS = {*fields_of("place"), *_SUDE, "category", "token", "initializer", "method", "seed"}
_SETTINGS = [f.name for f in fields(TuningConfig) if f.name not in _NO_SETTINGS | {"dtype"}]


class Judge(Protocol):
    """Who knows what a run's subject is, such as `sude_lab.world.oracle.DrawnJudge`.

    `measures`: whether it can say anything of pictures; `attributes`: those that the subject's one
    picture does not show; `backgrounds`: the phrases of those that it can be asked for.
    """

    @property
    def measures(self) -> bool: ...
    @property
    def attributes(self) -> tuple[str, ...]: ...
    @property
    def backgrounds(self) -> tuple[str, ...]: ...

    def measure(
        self, images: Sequence[Image.Image], text: str, attribute: str, background: str
    ) -> dict[str, list[float | None]]:
        """Return its measures of pictures of one prompt; None where nothing of it was asked."""


Judges = Callable[[TuningConfig, Iterable[Image.Image]], Judge | None]
"""Gives the judge of a run by its configuration and its references; None: nobody knows better."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` wrote: a row a picture and metric, their comparison, and that for people."""

    out: Path
    scores: pd.DataFrame
    table: pd.DataFrame
    text: str


@dataclass(frozen=True)
class _Job:
    """One run, and everything that is to be drawn and measured of it."""

    run: Run
    label: dict[str, Any]
    prompts: list[Prompt]
    references: list[Image.Image]
    metrics: tuple[str, ...]
    judge: Judge | None
    sampling: dict[str, Any]
    negative_prompt: str | None
    seed: int
    num_images: int


def evaluate(
    runs: Path | str | Sequence[Path | str],
    *,
    out: Path | str | None = None,
    references: Path | str | None = None,
    prompts: Sequence[str] = ("attributes",),
    structure: str = "default",
    num_images: int = 4,
    seed: int = 0,
    metrics: Sequence[str] = (),
    encoders: Sequence[str] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    device: str = "auto",
    progress: bool = True,
    judges: Judges | None = None,
    open_base: Callable[[Run], Backbone] | None = None,
    opened_encoders: dict[str, Encoder] | None = None,
) -> Evaluation:
    """Draw what is missing of the runs' pictures, measure all of them, and write the tables.

    What has no word here is a flag of `sude-lab evaluate`, and means what its help says.

    Args:
        runs: Folders of finished runs; RUN@25, RUN@scale=0.5: see `sude_lab.runs.strength`.
        metrics: Names of `LEARNED`, or oracle; (): the paper's four, or where there is a judge the
            oracle, and what the encoders that are named can measure.
        judges: Gives the judge of a run, such as `sude_lab.world.oracle.drawn_judge`; None:
            nobody knows better than the learned metrics.
        open_base: Opens the model that a run was tuned on, untuned; None: `Run.open_base`.
        opened_encoders: Encoders by name, to be used and added to; None: they are opened anew.

    Raises:
        UserError: bad input, or an encoder that cannot be had (nothing is drawn or written then);
            or a run that cannot be opened (what was computed before stays).
    """
    check_whole("--num-images", num_images, 1, MOST)
    check_whole("The seed", seed, 0, 2**32 - 1)
    runs = [runs] if isinstance(runs, str | Path) else runs
    prompts, metrics, encoders = listed(prompts), listed(metrics), listed(encoders)
    if not runs:
        raise UserError("Name at least one run: the --out folder of `sude-lab tune`.")
    if len(runs) > 1 and out is None:
        raise UserError("Name a folder for the tables of several runs with --out.")
    opened = [Run.open(folder) for folder in runs]
    target = Path(out) if out is not None else _tables(opened[0])
    if target.is_file():
        raise UserError(f"{target} is a file: --out takes a folder.")
    require_own(target, SCORES, "run,settings,", (TABLE, REPORT))
    encoder_folders = _encoder_folders(encoders)
    labels = _labels(opened)
    several = len({label["subject"] for label in labels}) > 1
    folder = None if references is None else Path(references)
    sampler = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    jobs = []
    for run, label in zip(opened, labels, strict=True):
        images = _references(run, folder, several)
        judge = judges(run.config, images) if judges else None
        asked = prompts_of(run.config, prompts, judge, structure=structure, references=folder)
        chosen = _chosen_metrics(metrics, run.config, encoder_folders, judge)
        scale = run.strength.guidance_scale
        own = sampler if scale is None else sampler | {"guidance_scale": scale}
        sampling = sampling_settings(read_facts(run.config.backbone), **own)
        negative = negative_prompt and run.prompt(negative_prompt)
        how = (sampling, negative, seed, num_images)
        jobs.append(_Job(run, label, asked, images, chosen, judge, *how))
    needed = {LEARNED[name][0] for job in jobs for name in job.metrics if name in LEARNED}
    # Before anything is drawn: whoever waits for an hour should not learn then that one is missing.
    ready = {} if opened_encoders is None else opened_encoders
    for name in ENCODERS:
        if name in needed and name not in ready:
            ready[name] = open_encoder(name, encoder_folders.get(name), device=device)
    open_base = open_base or (lambda run: run.open_base(device))
    tables = []
    for job in jobs:
        pictures = _pictures(job, open_base, progress)
        tables.append(_scored(job, pictures, ready, progress))
        write_table(_tables(job.run) / SCORES, tables[-1])
    import pandas as pd

    scores = pd.concat(tables, ignore_index=True)
    table = m.compare(scores)
    text = report(table, scores)
    write_table(target / SCORES, scores)
    write_table(target / TABLE, table.round(5))
    write_file(target / REPORT, text)
    return Evaluation(target, scores, table, text)


# --- what is asked for ---------------------------------------------------------------------------


def _tables(run: Run) -> Path:
    """Return the folder of a run's own tables; the pictures of all its strengths lie together."""
    return run.folder / FOLDER / str(run.strength)


def _encoder_folders(encoders: Sequence[str]) -> dict[str, str]:
    for text in encoders:
        name, _, folder = text.partition("=")
        if name not in ENCODERS or not folder:
            choices = f"with a name among {', '.join(ENCODERS)}"
            raise UserError(f"--encoders {text!r} must read NAME=FOLDER {choices}.")
    return dict(text.split("=", 1) for text in encoders)


def _chosen_metrics(
    names: Sequence[str], config: TuningConfig, folders: dict[str, str], judge: Judge | None
) -> tuple[str, ...]:
    every = {name.lower(): name for name in (ORACLE, *LEARNED)}
    wrong = [name for name in names if name.lower() not in every]
    if wrong:
        raise UserError(f"There is no metric {wrong[0]!r}: choose {', '.join(every.values())}.")
    judged = judge is not None and judge.measures
    if not names:
        learned = tuple(name for name, (encoder, _) in LEARNED.items() if encoder in folders)
        return (ORACLE, *learned) if judged else PAPERS
    chosen = tuple(dict.fromkeys(every[name.lower()] for name in names))
    if ORACLE in chosen and not judged:
        raise UserError(
            f"The oracle knows the drawn world alone, and a run on {config.backbone} draws another "
            "one: choose other --metrics."
        )
    return chosen


def _labels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Name each run by what sets it apart from the others of its method."""
    labels: list[dict[str, Any]] = []
    looks: dict[str, str] = {}
    names = settings_and_variants([run.config for run in runs])
    for run, (settings, variant) in zip(runs, names, strict=True):
        config, strength = run.config, str(run.strength)
        # Pictures of two subjects may have one name, the copies of one picture several.
        subject, look = subject_name(config), digest(run.picture().tobytes())
        if looks.setdefault(subject, look) != look:
            subject += f"-{look[:6]}"
        label: dict[str, Any] = {"run": in_utf_8(str(run)), "settings": settings}
        label |= {"variant": ", ".join(filter(None, (variant, strength))), "strength": strength}
        label |= {n: getattr(config, n) for n in ("method", "weight_sude", "category")}
        label |= {"subject": subject, "tuning_seed": config.seed}
        for other in labels:
            if other | {"run": label["run"]} == label:
                raise UserError(
                    f"{other['run']} and {run} are runs of the same settings, subject and "
                    "seed: give one of them."
                )
        labels.append(label)
    return labels


def settings_and_variants(configs: Sequence[TuningConfig]) -> list[tuple[str, str]]:
    """Name each configuration by what sets it apart: its method's settings, and its use of SuDe.

    ("dreambooth, lora_rank 4", "SuDe, weight_sude 2.0"), or "plain" for the latter, or the file of
    another regulariser; only what differs within a method is named.
    """
    varying: dict[str, tuple[list[str], list[str]]] = {}
    for method in dict.fromkeys(c.method for c in configs):
        family = [c for c in configs if c.method == method]
        with_sude = [c for c in family if c.weight_sude]
        varying[method] = _varying(family, _SETTINGS), _varying(with_sude, _SUDE)
    several = len({c.backbone for c in configs}) > 1
    names = []
    for c in configs:
        settings, sude = ([f"{n} {getattr(c, n)}" for n in part] for part in varying[c.method])
        general = [c.method, *settings, *([Path(c.backbone).name] if several else [])]
        used = Path(c.regularizer_file).name if c.regularizer_file else "SuDe"
        names.append((", ".join(general), ", ".join([used, *sude]) if c.weight_sude else "plain"))
    return names


def _varying(configs: Sequence[TuningConfig], names: Sequence[str]) -> list[str]:
    return [n for n in names if len({str(getattr(c, n)) for c in configs}) > 1]


def subject_name(config: TuningConfig) -> str:
    """Return the name of a run's subject: its picture's, or the folder's of a numbered one.

    "rex" for rex.jpg, "dog" for dog/00.jpg.
    """
    stem, folder = config.image.stem, config.image.parent.name
    return in_utf_8(folder if stem.isdigit() and folder else stem)


def prompts_of(
    config: CompleteConfig,
    names: Sequence[str],
    judge: Judge | None,
    *,
    structure: str = "default",
    references: Path | None = None,
) -> list[Prompt]:
    """Return what `evaluate` asks of a run with this configuration."""
    sets = [_prompt_set(name, config, references, structure, judge) for name in names]
    prompts = list(dict.fromkeys(prompt for asked in sets for prompt in asked))
    if not prompts:
        raise UserError(f"Name prompts with --prompts: {', '.join(PROMPT_SETS)}, or a file.")
    for prompt in prompts:
        filled(prompt.text, config)  # says so where a subject is asked for that the run lacks
    return prompts


def _references(run: Run, folder: Path | None, several: bool) -> list[Image.Image]:
    """Return the references of a run; `several`: whether the runs are of more than one subject."""
    if folder is None:
        return [run.picture()]
    name = subject_name(run.config)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --references takes one with pictures.")
    if find_dreambench(folder):
        paths = load_dreambench(folder).subject(name).images
    else:
        place = folder / name if (folder / name).is_dir() else folder
        paths = pictures_in(place)
        if not paths:
            raise UserError(f"There are no pictures in {place}: put some there.")
        if several and place == folder:
            raise UserError(
                f"The pictures in {folder} are of one subject, the runs of several: put those of "
                f"each in a folder of its name ({name}, ...)."
            )
    return [open_picture(path) for path in paths]


def _prompt_set(
    name: str, config: TuningConfig, references: Path | None, structure: str, judge: Judge | None
) -> list[Prompt]:
    category = config.category
    if name == "dreambench":
        if references is None or find_dreambench(references) is None:
            raise UserError("--prompts dreambench needs the data set: name it with --references.")
        return list(load_dreambench(references).subject(subject_name(config)).prompts)
    if name not in PROMPT_SETS:
        if not is_file(name):
            raise UserError(
                f"There is no file {name[:200]!r} and no prompts of that name: choose "
                f"{', '.join(PROMPT_SETS)}, or name a file."
            )
        return read_prompts(Path(name), *(s.category for s in config.subjects))
    template = config.prompt or get_method(config.method).template
    nothing: tuple[str, ...] = ("",)
    attributes = places = nothing
    if name in ("attributes", "combinations"):
        attributes = judge.attributes if judge else attributes_of(category)
    if name in ("backgrounds", "combinations"):
        places = judge.backgrounds if judge else backgrounds()
    pairs = product(attributes, places)
    return [prompt_for(template, category, *pair, structure=structure) for pair in pairs]


# --- drawing -------------------------------------------------------------------------------------


def _folder(job: _Job, prompt: Prompt) -> Path:
    # What a run is follows from its settings and its end: a new run in an old folder is another.
    made = b"".join((job.run.folder / n).read_bytes() for n in (CONFIG, ENVIRONMENT))
    about = {
        "run": digest(made)[:16],
        "prompt": job.run.prompt(prompt.text),
        "negative_prompt": job.negative_prompt,
        "sampling": job.sampling,
    }
    if strength := str(job.run.strength):
        about["strength"] = strength
    slug = re.sub(r"\W+", "-", prompt.text.replace("{S*}", "S"))[:48].strip("-")
    folder = job.run.folder / FOLDER / PICTURES
    return folder / f"{slug}-{hash_of(about)[:10]}" / f"seed-{job.seed}"


def _read(path: Path) -> Image.Image | None:
    try:
        return open_picture(path)
    except UserError:  # not there, or cut short by a power cut: it is drawn
        return None


def _pictures(
    job: _Job, open_base: Callable[[Run], Backbone], progress: bool
) -> list[list[Image.Image]]:
    """Return each prompt's pictures; those that are missing are drawn, which alone opens a model.

    The last bits of a picture depend on those that are drawn with it, at most `BATCH` of one
    prompt: what a stopped command left out is drawn with the same ones again.
    """
    pictures: list[list[Image.Image]] = [[] for _ in job.prompts]
    backbone, base = None, cache(partial(open_base, job.run))
    total, about = len(job.prompts) * job.num_images, f"drawing, {job.label['variant']}"
    batches = product(enumerate(job.prompts), range(0, job.num_images, BATCH))
    with tqdm(total=total, desc=about, unit="picture", disable=not progress) as bar:
        for (n, prompt), first in batches:
            numbers = range(first, min(first + BATCH, job.num_images))
            folder = _folder(job, prompt)
            paths = [folder / f"{k:03d}.png" for k in numbers]
            images = [_read(path) for path in paths]
            if None in images:
                if backbone is None:
                    backbone = job.run.load(backbone=open_base(job.run))
                    texts = [job.run.prompt(p.text) for p in job.prompts]
                    texts.append(job.negative_prompt or "")
                    for remark in remarks(backbone, texts, *job.run.tokens):
                        tqdm.write(remark, file=sys.stderr)
                how = (job.run.config, backbone, prompt.text, job.run.strength)
                with guidance_for(*how, open_base=base):
                    drawn = generate(
                        backbone,
                        job.run.prompt(prompt.text),
                        num_images=len(numbers),
                        first=first,
                        seed=job.seed,
                        negative_prompt=job.negative_prompt,
                        batch_size=BATCH,
                        **job.sampling,
                    )
                for k, path in enumerate(paths):
                    if images[k] is None:
                        with atomic_write(path) as file:
                            drawn[k].save(file)
                        images[k] = drawn[k]
            pictures[n] += filter(None, images)
            bar.update(len(numbers))
    return pictures


# --- measuring -----------------------------------------------------------------------------------


def _scored(
    job: _Job, pictures: list[list[Image.Image]], encoders: dict[str, Encoder], progress: bool
) -> pd.DataFrame:
    import pandas as pd

    images = [image for of_prompt in pictures for image in of_prompt]
    asked = list(product(enumerate(job.prompts), range(job.num_images)))
    columns: dict[str, tuple[str, list[float | None]]] = {}
    for name in job.metrics:
        if name in LEARNED:
            encoder, compares_text = LEARNED[name]
            reader = encoders[encoder]
            features = reader.images(images, progress=progress).numpy()
            if compares_text:
                captions = reader.texts([prompt.caption for (_, prompt), _ in asked]).numpy()
                similarities = m.text_similarity(features, captions)
            else:
                similarities = m.image_similarity(features, reader.images(job.references).numpy())
            columns[name] = (reader.identity, similarities.tolist())
    if ORACLE in job.metrics and job.judge is not None:
        for prompt, of_prompt in zip(job.prompts, pictures, strict=True):
            about = (prompt.text, prompt.attribute, prompt.background)
            for name, measured in job.judge.measure(of_prompt, *about).items():
                columns.setdefault(name, (ORACLE, []))[1].extend(measured)
    rows = []
    folders = [_folder(job, p).relative_to(job.run.folder).as_posix() for p in job.prompts]
    for i, ((number, prompt), k) in enumerate(asked):
        row = job.label | {"number": number, "kind": prompt.kind, "prompt": prompt.text}
        row |= {name: getattr(prompt, name) for name in ("caption", "attribute", "background")}
        row |= {"seed": job.seed, "picture": k, "file": f"{folders[number]}/{k:03d}.png"}
        for name, (encoder, values) in columns.items():
            if (value := values[i]) is not None:
                rows.append(row | {"metric": name, "encoder": encoder, "value": round(value, 5)})
    return pd.DataFrame(rows)


# --- telling -------------------------------------------------------------------------------------


def report(table: pd.DataFrame, scores: pd.DataFrame) -> str:
    """Return the table of `metrics.compare` for people, in Markdown, with what one must know."""
    import pandas as pd

    lines = []
    keys = ["settings", "variant", "kind"]
    for (settings, variant, kind), group in table.groupby(keys, sort=False):
        line = {"settings": settings, "": variant, "prompts": kind}
        line |= {str(row["metric"]): _cell(row) for row in group.to_dict("records")}
        line |= {"pictures": str(group["pictures"].max()), "intervals over": group["over"].iloc[0]}
        lines.append(line)
    cells = pd.DataFrame(lines).fillna("").map(lambda x: str(x).replace("|", "\\|"))
    compared = "difference" in table and table["difference"].notna().any()
    encoders = scores[scores["encoder"] != ORACLE][["metric", "encoder"]].drop_duplicates()
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    return page.get_template("table.md.jinja").render(
        cells=cells.to_markdown(index=False, disable_numparse=True),
        subjects=table["over"].str.contains("subjects").all(),
        against=", ".join(dict.fromkeys(table["against"].dropna())) if compared else "",
        texts=any(name in LEARNED and LEARNED[name][1] for name in table["metric"]),
        encoders="; ".join(f"{metric}: {name}" for metric, name in encoders.to_numpy()),
        oracle=ORACLE in set(scores["encoder"]),
    )


def _cell(row: dict[Any, Any]) -> str:
    text = Interval(row["mean"], row["low"], row["high"], 0).words(".3f")
    if math.isnan(row.get("difference", math.nan)):
        return text
    gain = Interval(row["difference"], row["difference_low"], row["difference_high"], 0)
    return f"{text} ({gain.words('+.3f')})"
