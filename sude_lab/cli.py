"""The command line, made from the dataclasses.

`sude-lab demo | tune | generate | evaluate | sweep | bench | classify | export | lab | release`
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from sude_lab.config import TuningConfig
from sude_lab.errors import UserError, machine_failure, one_line
from sude_lab.io.files import process_number, sole_writer


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Tune on one drawn picture with and without SuDe, and write a report of the difference."""

    out: Path
    """Folder for results.csv, report.html and the runs."""
    seed: int = 0
    """Seed of the subject, of the tuning and of the drawn pictures."""
    category: str = "dog"
    """What the subject is: any category of the embedded model."""
    num_images: int = 8
    """Pictures for every prompt."""
    max_train_steps: int = 100

    def execute(self) -> None:
        from sude_lab.demo import REPORT, run_demo, table_with_intervals

        with sole_writer(self.out, inside=True):
            table = run_demo(**vars(self))
        print(table_with_intervals(table).round(3).to_string(index=False))
        print(f"Open {self.out / REPORT} in a browser.")


@dataclass(frozen=True, kw_only=True)
class Tune(TuningConfig):
    """Tune a model on one picture, regularised by SuDe."""

    image: Positional[Path]
    """The one picture of the subject."""
    out: Path
    """Folder of the run; it must be new, or hold the run to resume."""
    preset: Literal["default", "paper", "reference"] = "default"
    """paper: the text's choices; reference: the authors' code's; single flags still win."""
    resume: bool = False
    """Continue an unfinished run; it ends with the same weights as an unbroken one."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_at: tuple[int, ...] = ()
    """Keep the weights after these steps, too: draw and evaluate them as OUT@25."""
    num_samples: int = 4
    """Pictures a prompt in samples.png; 0 draws none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of samples.png, with {S*}; none: the tuning prompt."""
    validation_every: int = 0
    """Steps between the grids in validation/; 0 draws none. The result is the same to the bit."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the grids in validation/; none: those of samples.png."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, or any tracker accelerate knows; all that are installed; none."""
    push_to_hub: tuple[str, ...] | None = None
    """Upload the finished run to the Hub, without the picture; REPO is name or owner/name, none:
    the name of --out."""

    def __post_init__(self) -> None:
        """Leave the checks to the `TuningConfig` that is made of this, outside the parser."""

    def execute(self) -> None:
        from torch import distributed

        from sude_lab.runs.folder import run_tuning

        settings = dict(vars(self))
        config = TuningConfig(**{f.name: settings.pop(f.name) for f in fields(TuningConfig)})
        repository = settings.pop("push_to_hub")
        _check_repository(repository)  # before the work
        run = run_tuning(config, **settings)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        if process_number():
            return
        print(f"The run is in {run.folder}.")
        _push(run, repository)
        print(f'Draw with it: sude-lab generate {run.folder} "photo of a {{S*}}" --out pictures')


@dataclass(frozen=True, kw_only=True)
class _Trusting:
    trust_backbone: bool = False
    """Open a model that lies in the run's folder or beside it, as whoever sent both may want."""


@dataclass(frozen=True, kw_only=True)
class _Drawing(_Trusting):
    seed: int = 0
    """The first seed of drawing."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of drawing; none: that of the tuning."""


@dataclass(frozen=True, kw_only=True)
class Generate(_Drawing):
    """Draw pictures with a finished run."""

    run: Positional[Path]
    """The folder that `sude-lab tune` wrote; FOLDER@25, FOLDER@scale=0.5: another strength."""
    prompt: Positional[str]
    """What to draw; {S*} is the subject: "photo of a running {S*} dog"."""
    out: Path
    """Folder for the pictures; it must be new or empty."""
    num_images: int = 8
    sude_guidance: float = 0.0
    """SuDe without training: strength g of the pull back to the category; 1 meets it, 0 is none."""

    def execute(self) -> None:
        from sude_lab.generation import generate, remarks
        from sude_lab.io.files import atomic_folder
        from sude_lab.prompts import PLACEHOLDER, by_itself
        from sude_lab.runs.folder import Run
        from sude_lab.runs.strength import guidance_for

        run = Run.open(self.run)
        strength = run.strength
        if self.sude_guidance:
            strength = replace(strength, sude_guidance=self.sude_guidance)
        if not self.prompt.strip():
            raise UserError('The prompt is empty: for example "photo of a {S*}".')
        prompt, negative = run.prompt(self.prompt), run.prompt(self.negative_prompt or "")
        settings = _some(self, "num_images", "seed", "num_inference_steps", "guidance_scale")
        settings |= {"negative_prompt": negative or None, "progress": True}
        if self.guidance_scale is None:
            settings["guidance_scale"] = strength.guidance_scale
        # Where it cannot be written, no model is opened.
        with sole_writer(self.out), atomic_folder(self.out) as folder:
            backbone = run.load(self.device, dtype=self.dtype, trust_backbone=self.trust_backbone)
            for remark in remarks(backbone, [prompt, negative], *run.tokens):
                _warn(remark)
            if not any(by_itself(token).search(prompt) for token in run.tokens):
                _warn(f"The prompt has no {PLACEHOLDER}: the subject is not asked for.")
            with guidance_for(run.config, backbone, self.prompt, strength):
                images = generate(backbone, prompt, **settings)
            for k, image in enumerate(images):
                image.save(folder / f"{k:03d}.png")
        print(f"{len(images)} picture{'s are' if len(images) > 1 else ' is'} in {self.out}.")


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Drawing):
    """Draw and measure runs, and compare them in pairs; the same command continues."""

    runs: Positional[tuple[Path, ...]]
    """Folders that `sude-lab tune` wrote; FOLDER@25, FOLDER@scale=0.5: other strengths."""
    out: Path | None = None
    """Folder of scores.csv, table.csv and table.md; none: RUN/evaluation, for one run."""
    references: Path | None = None
    """Pictures of the subject, folders of subjects, or DreamBench; none: the run's own picture."""
    prompts: tuple[str, ...] = ("attributes",)
    """attributes, plain, backgrounds, combinations, dreambench, or files, with {S*}."""
    structure: Literal["default", "P1", "P2", "P3"] = "default"
    """Where the attribute stands: before the method's {S*}, or as in the paper's Table 2."""
    num_images: int = 4
    """Pictures for every prompt, each from noise of its own."""
    metrics: tuple[str, ...] = ()
    """CLIP-I, CLIP-T, DINO-I, BLIP-T, CLIP-L-I, CLIP-L-T, DINOv2-I, oracle; none: those four, or
    on the embedded model the oracle."""
    encoders: tuple[str, ...] = ()
    """Folders in place of the hub's encoders: clip=FOLDER dino=FOLDER."""

    def execute(self) -> None:
        from sude_lab.evaluate.evaluate import FOLDER, SCORES, TABLE, evaluate
        from sude_lab.world.oracle import drawn_judge

        settings = dict(vars(self))
        opening = {name: settings.pop(name) for name in ("dtype", "trust_backbone")}
        settings["open_base"] = lambda run: run.open_base(self.device, **opening)
        out = self.out or Path(*self.runs[:1], FOLDER)
        with sole_writer(out, inside=True):
            done = evaluate(**settings, judges=drawn_judge)
        print(done.text)
        print(f"The table is in {done.out / TABLE}, a row a picture in {done.out / SCORES}.")


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Tell which of some prompts fits a picture, by the classifier inside the model."""

    image: Positional[Path]
    """The picture."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A prompt to choose from; give the flag once for each, twice at least."""
    num_pairs: int = 32
    """Pairs of a timestep and noise that a prompt is asked at most: more, and surer."""
    weighting: Literal["elbo", "simple"] = "elbo"
    """elbo: the bound on the likelihood; simple: every timestep counts alike."""
    prune: bool = True
    """Stop asking prompts that are hopelessly behind."""
    caution: float = 2.5
    """How many standard errors behind is hopeless."""
    json: bool = False
    """Print one JSON document."""
    batch_size: int = 64
    """Evaluations of the UNet at once."""
    seed: int = 0
    backbone: str = "embedded"
    """embedded, a pipeline folder, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"

    def execute(self) -> None:
        from sude_lab.classify.implicit import ImplicitClassifier, checked_prompts
        from sude_lab.generation import remarks
        from sude_lab.io.opening import open_backbone
        from sude_lab.io.pictures import load_picture, open_picture

        # What is wrong with these is said before a large model is opened.
        checked_prompts(self.prompt)
        open_picture(self.image)
        backbone = open_backbone(self.backbone, device=self.device, dtype=self.dtype)
        how = _some(self, "num_pairs", "weighting", "prune", "caution", "batch_size", "seed")
        classifier = ImplicitClassifier(backbone, self.prompt, **how)
        picture = load_picture(self.image, resolution=backbone.resolution)
        (verdict,) = classifier.classify([picture.image], progress=True)
        for note in (*picture.notes, *remarks(backbone, self.prompt)):
            _warn(note)
        rows = verdict.rows()
        if self.json:
            about = _some(self, "backbone", "weighting", "num_pairs", "seed")
            about |= {"image": str(self.image), "evaluations": int(verdict.pairs.sum())}
            print(json.dumps(about | {"prompts": rows}, indent=2))
            return
        for row in rows:
            prompt = row["prompt"] or '"" (no prompt)'
            print(f"{row['probability']:.4f} +/- {row['standard_error']:.4f}  {prompt}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Tune and judge a grid of runs, here or on a cluster; the same command continues."""

    grid: Positional[Path]
    """The grid file (YAML), such as data/grids/w_s.yaml."""
    out: Path
    """Folder of the sweep: results.parquet, and the runs."""
    runs: Path | None = None
    """Folder of the runs, which several sweeps may share; none: OUT/runs."""
    dry_run: bool = False
    """Write nothing; say how many runs, pictures, hours and gigabytes are left, what is running now
    and what failed."""
    workers: int = 1
    """Processes of one thread each on this machine; they end with this one."""
    cluster: str | None = None
    """For Ray: local, auto, or ray://HOST:PORT; none: one run after another in this process."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def execute(self) -> int:
        from sude_lab.sweep.grid import make_plan, read_grid
        from sude_lab.sweep.sweep import RESULTS, describe, sweep

        if self.dry_run:
            print(describe(make_plan(read_grid(self.grid), self.out, self.runs)))
            return 0
        settings = vars(self) | {}
        del settings["dry_run"]
        failed = sweep(**settings)
        print(f"The table is {self.out / RESULTS}.")
        if failed:
            key, reason = next(iter(failed.items()))
            first = f"{len(failed)} runs failed, the first one ({key}) because: {reason}"
            again = "The table's column error has all reasons; the same command tries again."
            _warn(f"sude-lab: {first} {again}")
        return int(bool(failed))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare a regulariser of your own with SuDe and less tuning; the same command continues."""

    file: Positional[Path]
    """A Python file that defines `regularizer(x_t, t, output, frozen)`; it is run."""
    out: Path
    """Folder of bench.md, bench.png, bench.csv and the runs."""
    size: Literal["minutes", "hour", "whole"] = "minutes"
    """Two or six development subjects, or the 36 of the comparison (guide: bench)."""
    weights: tuple[float, ...] = (0.5, 1.0, 2.0)
    """w_s of the runs."""
    seed: int = 0
    """Seed of the tuning; the stored lines have 0."""
    token_learning_rate: float | None = None
    """Train the subject's word, too."""
    train_text_encoder: bool = False
    """Train the text encoder, too."""
    workers: int = 1
    """Processes of one thread each on this machine."""

    def execute(self) -> None:
        from sude_lab.sweep.bench import FIGURE, PAGE, bench

        with sole_writer(self.out, inside=True):
            print(bench(**vars(self)))
        print(f"This is in {self.out / PAGE}, the fronts are in {self.out / FIGURE}.")


@dataclass(frozen=True, kw_only=True)
class Export(_Trusting):
    """Write a finished run in a form that other programs read."""

    run: Positional[Path]
    """The folder that `sude-lab tune` wrote."""
    out: Path | None = None
    """A new folder for a pipeline, a new .safetensors file for kohya."""
    format: Literal["pipeline", "kohya"] = "pipeline"
    """pipeline: a whole diffusers pipeline folder; kohya: a LoRA for the web UIs."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; none: float32 for a pipeline, float16 for kohya."""
    share: Path | None = None
    """A new folder for others: card, weights and samples, and no photo of the subject."""
    push_to_hub: tuple[str, ...] | None = None
    """Upload what --share writes to the Hub; REPO is name or owner/name, none: the run's name."""

    def execute(self) -> None:
        from sude_lab.runs.export import export_pipeline, share, write_kohya
        from sude_lab.runs.folder import Run

        if self.out is None and self.share is None and self.push_to_hub is None:
            raise UserError("Name what to write: --out, --share or --push-to-hub.")
        _check_repository(self.push_to_hub)
        run = Run.open(self.run)
        if self.out is not None and self.format == "kohya":
            write_kohya(run, self.out, self.dtype or "float16")
            print(f"The LoRA is {self.out}.")
        elif self.out is not None:
            trusted = self.trust_backbone
            export_pipeline(run, self.out, self.dtype or "float32", trust_backbone=trusted)
            print(f"The pipeline is in {self.out}.")
        if self.share is not None:
            share(run, self.share)
            print(f"What can be shared is in {self.share}.")
        _push(run, self.push_to_hub)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Open the notebooks in JupyterLab."""

    browser: bool = True
    """Open a browser window."""

    def execute(self) -> None:
        from sude_lab.io.opening import data_folder

        notebooks = data_folder().parent / "notebooks"
        if not notebooks.is_dir():
            raise UserError(f"There are no notebooks in {notebooks}: run from a clone.")
        if importlib.util.find_spec("jupyterlab") is None:
            raise UserError("JupyterLab is not installed: pip install jupyterlab.")
        command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={notebooks}"]
        if not self.browser:
            command.append("--no-browser")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--allow-root")  # a container, where there is no other user
        if code := subprocess.call(command):
            raise UserError(f"JupyterLab stopped with exit code {code}: its reason stands above.")


@dataclass(frozen=True, kw_only=True)
class Release:
    """Make the students' copies of the exercises, without solutions and hidden tests."""

    folder: Positional[Path | None] = None
    """Where to write them; it must be new or empty."""
    course: Path | None = None
    """Also make a folder to grade in with nbgrader; it must be new or empty, too."""
    lessons: Path | None = None
    """Write copies of the lessons, without outputs, into this folder; it must be new or empty."""

    def execute(self) -> None:
        from sude_lab.exercises.release import release, release_lessons

        if self.folder is None and (self.lessons is None or self.course is not None):
            raise UserError("Name the folder for the students' copies, or --lessons FOLDER.")
        if self.folder is not None:
            copies = release(self.folder, self.course)
            print(f"{len(copies)} students' copies are in {self.folder}, without solutions.")
            if self.course is not None:
                print(f"Grade in {self.course}: nbgrader autograde {copies[0].stem}, and so on.")
        if self.lessons is not None:
            books = release_lessons(self.lessons)
            print(f"{len(books)} lessons are in {self.lessons}, without outputs.")


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _some(command: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(command, name) for name in names}


def _check_repository(words: tuple[str, ...] | None) -> None:
    if words and (len(words) > 1 or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", words[0])):
        raise UserError(f"--push-to-hub {' '.join(words)!r} must be name or owner/name.")


def _push(run: Any, repository: tuple[str, ...] | None) -> None:
    if repository is not None:
        from sude_lab.runs.export import push

        print(f"The run is on the Hub as {push(run, *repository)}; a new repository is private.")


Command = Demo | Tune | Generate | Evaluate | Sweep | Bench | Classify | Export | Lab | Release


def _parse(arguments: Sequence[str] | None) -> Any:
    """Read the arguments; the box of several lines that tyro prints becomes one sentence."""
    box, dice = io.StringIO(), random.getstate()
    try:
        with redirect_stderr(box):
            about = "One picture of your dog should not cost a model what it knows of dogs."
            about += " Any command takes --debug: it shows where an error comes from."
            config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
            return tyro.cli(
                Command, args=arguments, prog="sude-lab", description=about, config=config
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(_from_box(box.getvalue())) from None
    finally:
        random.setstate(dice)  # tyro rolls dice for a cache of its own


def _from_box(box: str) -> str:
    """Return as sentences what tyro says in a box with a title and lines between its parts."""
    parts = [""]
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]:
        line = line.strip("│|╭╮╰╯+ ")
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if set(line) <= set("─-"):
            parts.append("")
        else:
            parts[-1] += f" {line}"
    text = " ".join(f"{part.strip().rstrip('.')}." for part in parts if part.strip())
    return f"{text or 'These arguments cannot be read.'} See sude-lab --help."


def _kept(command: Any) -> str:
    """Say what an interrupted command leaves, and how it is continued."""
    if isinstance(command, Tune):
        # Nothing is imported here: an import may be what was interrupted.
        if (command.out / "checkpoint.pt").is_file():
            return f"the checkpoint in {command.out} is kept: give the command with --resume"
        if (command.out / "config.json").is_file():
            return f"no checkpoint was due yet in {command.out}: --resume starts it anew"
        return "nothing was written; a run that has begun is continued with --resume"
    if isinstance(command, Demo | Evaluate | Sweep | Bench):
        return "what is finished is kept: the same command continues"
    return "nothing was written"


def wait_asleep() -> None:
    """On a machine that others keep busy, let threads sleep while they wait for each other.

    Those that wait awake take the processor from those they wait for. The number of threads stays,
    and with it every bit. OpenMP reads this once, when torch is loaded: lessons call it first.
    """
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if not said and load >= (os.cpu_count() or 1) / 2:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what goes wrong is one sentence on stderr.

    2: a `UserError`, or what the system refuses; 130: Ctrl-C; 143: SIGTERM while tuning; 1: a run
    of a sweep that failed, or an error that nobody thought of, a bug. With --debug the traceback
    comes first.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    wait_asleep()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = None
    try:
        # --debug may stand anywhere, also where the parser itself is at fault.
        command = _parse([word for word in words if word != "--debug"])
        return command.execute() or 0
    except BrokenPipeError:  # whoever read the output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if "--debug" in words:
            traceback.print_exception(error)
        code, text = _answer(error, command)
        # The main process speaks for all; what one knows alone is said with its number.
        who = f" (process {process_number()})" if process_number() else ""
        _warn(f"sude-lab{who}: {one_line(text)}")
        return code


def _answer(error: BaseException, command: Any) -> tuple[int, str]:
    """Return the exit code of an error, and the sentence that tells of it."""
    if isinstance(error, KeyboardInterrupt):
        code = 143 if type(error).__name__ == "Terminated" else 130  # as the shell counts signals
        return code, f"stopped; {_kept(command)}."
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("sude_lab"):
        cure = 'pip install "sude-lab[lab,sweep]", or pip install -e ".[lab,sweep]" in a clone'
        return 2, f"this command needs the package {error.name}: {cure}."
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename if isinstance(error.filename, str) else "A file"
        return 2, f"{name} cannot be read or written ({error.strerror})."
    if machine := machine_failure(error):
        return 2, f"{machine}: ask for less at once, or for another --device; {_kept(command)}."
    if isinstance(error, UnicodeEncodeError):  # as the system hands over a name of other bytes
        return 2, f"The name {error.object[:200]!r} is not UTF-8: rename the file."
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return 2, "This system names no home folder: set SUDE_LAB_CACHE to a folder for files."
    reason = f": {str(error).rstrip('.')}" if str(error) else ""
    bug = "this is a bug: run again with --debug and report it."
    return 1, f"{type(error).__name__}{reason}; {bug}"
