"""Nothing that is read is run, nothing written leaves its folder, no text becomes markup."""

import ast
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from refusals import content, generated, say

from sude_lab import demo
from sude_lab.adapters.unet import StableDiffusion
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.evaluate import evaluate
from sude_lab.evaluate.encoders import ENCODERS
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.evaluate.prompts import Prompt
from sude_lab.io.opening import backbone_identity, hub_id, open_backbone
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.runs.folder import Run, run_tuning

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("sude_lab", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip

# --- what is read is never run -------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call of a module: the name as it is written, and its constant keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {
                k.arg: k.value.value if isinstance(k.value, ast.Constant) else ...
                for k in node.keywords
                if k.arg
            }
            yield ast.unparse(node.func), keywords


def complaints(source: str) -> list[str]:
    """What in a module's text would run what it reads."""
    tree = ast.parse(source)
    risks = []
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        )
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        risks += [
            n
            for n in names
            if n.split(".")[0]
            in ("pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle")
        ]
    for name, keywords in calls(tree):
        last = name.rsplit(".", 1)[-1]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            risks.append(name)
        if last in ("exec_module", "run_path", "run_module"):
            risks.append(last)
        if name == "torch.load" and keywords.get("weights_only") is not True:
            risks.append(name)
        if keywords.get("allow_pickle") not in (None, False):
            risks.append("allow_pickle")
        if keywords.get("trust_remote_code") not in (None, False):
            risks.append("trust_remote_code")
        if keywords.get("shell") not in (None, False):
            risks.append("shell")
        if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            risks.append(name)
        if last in ("read_pickle", "getoutput", "getstatusoutput", "mktemp"):
            risks.append(name)
        if re.search(r"yaml\.(Unsafe|Full|)Loader$", name):
            risks.append(name)
    return risks


RUN = {
    "benchmarks/against_diffusers.py": ["run_path"],
    "sude_lab/exercises/judging.py": ["exec", "compile", "eval"],
    "sude_lab/runs/regularizer.py": ["exec", "compile"],
}
"""The benchmark runs the script of diffusers that its user names, the exercises run the wrong
answers of slips.txt, which comes with them, and changes of our own answers: text of this package,
and nothing of a file that somebody hands over. The regularizer is the user's own file, named for
this: --regularizer-file of tune, the file of bench, or a grid's setting. Only tuning runs it; a run
that is opened runs neither the file that its config.json names nor the copy in its folder."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_runs_what_it_reads(path: Path) -> None:
    expected = RUN.get(path.relative_to(ROOT).as_posix(), [])
    assert complaints(path.read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import load", "eval(x)", "exec(x)", "os.system(x)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)"),
        *("yaml.load(x, yaml.Loader)", "yaml.unsafe_load(x)", "yaml.UnsafeLoader(x)"),
        *("A.from_pretrained(x, trust_remote_code=True)", "subprocess.run(x, shell=True)"),
        *("runpy.run_path(x)", "spec.loader.exec_module(x)"),
        *("pd.read_pickle(x)", "a.from_pretrained(x, trust_remote_code=flag)"),
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert complaints(line)


def test_every_model_is_opened_from_safetensors() -> None:
    """diffusers and transformers fall back to pickles unless they are told not to."""
    for path in SOURCES:
        for name, keywords in calls(ast.parse(path.read_text(encoding="utf-8"))):
            *_, owner, last = ["", *name.split(".")]
            models = ("Tokenizer", "Scheduler", "Config", "Processor")
            if last == "from_pretrained" and not owner.endswith(models):
                safe = keywords.get("use_safetensors") is True
                assert safe or (path.name == "opening.py" and "apart" in path.read_text()), path


def test_encoders_are_pinned_to_a_commit() -> None:
    assert all(re.fullmatch("[0-9a-f]{40}", pinned.revision) for pinned in ENCODERS.values())


# --- hostile folders -----------------------------------------------------------------------------


def program(folder: Path, name: str) -> None:
    """A file of Python that leaves a trace beside the folder where it is run."""
    (folder / name).parent.mkdir(exist_ok=True)
    trace = str(folder.parent / "was-run")
    (folder / name).write_text(f"import pathlib; pathlib.Path({trace!r}).touch()\n")


def say_in(folder: Path, name: str, **values: Any) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | values))


def linked(folder: Path) -> None:
    program(folder.parent / "elsewhere", "diffusers.py")
    (folder / "unet" / "more").symlink_to(folder.parent / "elsewhere")


def nested(folder: Path, index: list[str]) -> None:
    shutil.copytree(folder, folder.parent / "inner")
    program(folder.parent / "inner", "unet/diffusers.py")
    (folder.parent / "inner").rename(folder / "feature_extractor")
    say_in(folder, "model_index.json", feature_extractor=index)


ENCODER, WORDS = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
KERNEL = "someone/kernel"
HOSTILE: dict[str, tuple[Any, str]] = {
    "a part's library": (lambda f: program(f, "unet/diffusers.py"), "unet/diffusers.py"),
    "the words' library": (lambda f: program(f, "tokenizer/transformers.py"), "transformers.py"),
    "a pipeline's own": (lambda f: program(f, "pipeline.py"), "pipeline.py"),
    "somewhere below": (lambda f: program(f, "vae/custom_generate/generate.py"), "generate.py"),
    "compiled": (lambda f: program(f, "unet/diffusers.pyc"), "diffusers.pyc"),
    "behind a link": (linked, "more/diffusers.py"),
    "a pipeline in it": (lambda f: nested(f, ["diffusers", "StableDiffusionPipeline"]),
                         "feature_extractor from"),
    "a pipeline under a name": (lambda f: nested(f, ["transformers", "CLIPImageProcessor"]),
                                "feature_extractor/"),
    "a part of its own": (lambda f: say_in(f, "model_index.json", more=["diffusers", "UNet"]),
                          "its more from"),
    "a class of our own": (lambda f: say_in(f, "model_index.json", vae=["diffusers", "AutoModel"]),
                           "its vae from"),
    "auto_map": (lambda f: say_in(f, ENCODER, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "auto_map of the words": (lambda f: say_in(f, WORDS, auto_map={"AutoTokenizer": [None, "x"]}),
                              "auto_map"),
    "auto_map within": (lambda f: say_in(f, ENCODER, a=[{"b": {"auto_map": "x"}}]), "auto_map"),
    "a kernel": (lambda f: say_in(f, ENCODER, attn_implementation=KERNEL), KERNEL),
    "a kernel within": (lambda f: say_in(f, ENCODER, a={"_attn_implementation": KERNEL}), KERNEL),
    "a kernel by default": (lambda f: say_in(f, ENCODER, attn_implementation="flash_attention_2"),
                            "flash_attention_2"),
    "another model's weights": (lambda f: (f / "text_encoder/adapter_config.json").write_text("{}"),
                                "adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_before_anything_is_opened(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    change, sentence = HOSTILE[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change(folder)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_backbone(folder, device="cpu")
    assert not (tmp_path / "was-run").exists()


def test_published_parts_are_no_hostile_ones(tiny_folder: Path, tmp_path: Path) -> None:
    """The index of a published Stable Diffusion names a checker, which is not opened."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    say_in(
        folder, "model_index.json", safety_checker=checker, scheduler=["diffusers", "PNDMScheduler"]
    )
    say_in(folder, ENCODER, attn_implementation="sdpa")
    open_backbone(folder, device="cpu")
    assert re.fullmatch(
        StableDiffusion.classes["feature_extractor"], "transformers CLIPImageProcessor"
    )


@pytest.mark.parametrize("where", ["inside", "beside", "by a relative path"])
def test_a_model_that_came_along_with_a_run_is_asked_about(
    where: str, finished: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "unpacked" / "run"
    shutil.copytree(finished.folder, run)
    folder = {"inside": run / "model", "beside": run.with_name("model")}.get(
        where, run.parent / "deep" / "model"
    )
    shutil.copytree(tiny_folder, folder)
    monkeypatch.chdir(run.parent)
    named = folder.relative_to(run.parent) if "relative" in where else folder
    say_in(run, "config.json", backbone=str(named))
    here = ("--device", "cpu", "--num-images", 1)
    out = tmp_path / "out"
    commands: list[tuple[Any, ...]] = [("generate", run, "a {S*}", *here), ("export", run)]
    for words in commands:
        assert "--trust-backbone" in say(*words, "--out", out).sentence and not out.exists()
    assert say(*commands[0], "--trust-backbone", "--out", out).code == 0
    monkeypatch.undo()
    say_in(run, "config.json", backbone=str(tiny_folder))  # somewhere else on this machine
    Run.open(run).load("cpu")


# --- hub ids -------------------------------------------------------------------------------------

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub's cache with one model of two commits; its main branch stands at the second."""
    from huggingface_hub import constants

    model = tmp_path / "hub" / "models--someone--tiny"
    for commit in (COMMIT, OTHER):
        shutil.copytree(tiny_folder, model / "snapshots" / commit)
    facts = model / "snapshots" / COMMIT / "sude_lab.json"
    values = json.loads(facts.read_text())
    values["generation"]["num_inference_steps"] = 3
    facts.write_text(json.dumps(values))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(OTHER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/tiny"


def test_a_hub_id_is_opened_at_its_revision_and_the_commit_is_kept(
    hub: str, subject_picture: Path, tmp_path: Path
) -> None:
    newest, pinned = (
        open_backbone(hub, device="cpu"),
        open_backbone(f"{hub}@{COMMIT}", device="cpu"),
    )
    assert (newest.commit, pinned.commit) == (OTHER, COMMIT)
    assert pinned.facts["generation"]["num_inference_steps"] == 3
    assert newest.facts["generation"]["num_inference_steps"] == 2
    config = TuningConfig(subject_picture, "dog", hub, max_train_steps=1, device="cpu")
    quiet: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}
    run = run_tuning(config, tmp_path / "run", **quiet)
    about = json.loads((run.folder / "environment.json").read_text())
    assert about["backbone_commit"] == OTHER
    # The hub moves on; the run stays the model's that it was tuned on.
    assert run.config.backbone == f"{hub}@{OTHER}"
    main = tmp_path / "hub" / "models--someone--tiny" / "refs" / "main"
    main.write_text(COMMIT)
    assert open_backbone(hub, device="cpu").commit == COMMIT
    assert Run.open(run.folder).load("cpu").commit == OTHER
    (run.folder / "environment.json").unlink()
    with pytest.raises(UserError, match="backbone"):
        run_tuning(config, run.folder, resume=True, **quiet)
    main.write_text(OTHER)
    assert run_tuning(config, run.folder, resume=True, **quiet).config == run.config
    card = (run.folder / "README.md").read_text()
    assert f"base_model: {hub}\n" in card
    assert f'from_pretrained("{hub}", revision="{OTHER}")' in card
    assert backbone_identity(hub) == f"{hub}@{OTHER}"
    assert backbone_identity(f"{hub}@{COMMIT}") == f"{hub}@{COMMIT}"
    assert backbone_identity("someone/else") is backbone_identity("someone/else@main") is None


def test_a_revision_that_is_not_there_is_refused(hub: str) -> None:
    with pytest.raises(UserError, match="could not be opened"):
        open_backbone(f"{hub}@{'c' * 40}", device="cpu")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/na.me-1@v1.0", ("owner/na.me-1", "v1.0")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        *((x, None) for x in ("name", "a/b/c", "owner/name@", "owner/name@a b", "/a/b", "ä/b")),
        *((x, None) for x in ("https://host/name", "owner/name@x?y", "a/b\n", "a/b@c@d", "")),
    ],
)
def test_what_is_a_hub_id(source: str, expected: tuple[str, str | None] | None) -> None:
    assert hub_id(source) == expected


def test_a_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_id("owner/name") is None


# --- what is written stays in its folder ---------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(
        [
            *("..", ".", "../x", "../../x", "/etc/x", "//x", "~", "~root", "a/../../x", "\\..\\x"),
            *("CON", "NUL", "aux.txt", "x:y", "-rf", "--out", "\0", "a\0b", "\n", "\u202egnp.exe"),
            *(
                "a" * 300,
                "ä" * 200,
                "🐕" * 100,
                "%2e%2e%2f",
                "$HOME",
                "`id`",
                "*",
                "?",
                "{S*}/../x",
            ),
        ]
    ),
    st.text(max_size=80),
)


@pytest.fixture(scope="module")
def finished(
    tiny_folder: Path, subject_picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    config = TuningConfig(
        subject_picture, "dog", str(tiny_folder), "textual_inversion", max_train_steps=1,
        weight_sude=0.0, device="cpu",
    )  # fmt: skip
    quiet: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}
    return run_tuning(config, tmp_path_factory.mktemp("secure") / "run", **quiet)


@generated(120)
@given(text=NAMES, negative=NAMES)
def test_no_prompt_leaves_the_folder_of_the_evaluation(
    text: str, negative: str, finished: Run
) -> None:
    job: Any = SimpleNamespace(run=finished, negative_prompt=negative, sampling={}, seed=0)
    try:
        folder = evaluate._folder(job, Prompt(text, text))
    except UserError as error:
        assert "is no text" in str(error) or "asks for" in str(error)
        return
    inside = folder.relative_to(finished.folder / "evaluation").parts
    assert len(inside) == 3 and inside[0] == "pictures" and inside[2] == "seed-0"
    assert ".." not in inside and len(inside[1].encode()) <= 255
    assert re.fullmatch(r"[\w-]+", inside[1]) and not inside[1].startswith("--")


@generated(40)
@given(token=NAMES, category=NAMES)
def test_no_token_and_no_category_leaves_the_folder_of_the_run(
    token: str, category: str, fresh: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Taken or refused; the weights of a token that is taken lie where they should."""
    from sude_lab.methods import configure, get_method

    backbone: Backbone = fresh()
    backbone.facts = {}  # of a model that does not say which words it knows
    try:
        config = TuningConfig(
            Path("x.png"), backbone.check_category(category), token=token,
            method="textual_inversion", weight_sude=0.0, prior="current",
        )  # fmt: skip
        method = get_method("textual_inversion")(backbone, configure(config, backbone))
    except UserError as error:
        assert str(error).isprintable()
        return
    assert not set(config.category) & set("/\\\0") and config.category not in ("", ".", "..")
    room = tmp_path_factory.getbasetemp() / "tokens"
    shutil.rmtree(room, ignore_errors=True)
    method.prepare()
    save_weights(method, room / "weights")
    assert list(content(room)) == ["weights", "weights/learned_embeds.safetensors"]
    again: Backbone = fresh()
    load_weights("textual_inversion", again, room / "weights")
    assert token in again.tokenizer.get_vocab()


def test_names_of_pictures_and_subjects_stay_in_the_folder(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """One run whose every word tries to leave; around its folder nothing changes."""
    room, pictures = tmp_path / "room", tmp_path / "pictures"
    room.mkdir()
    pictures.mkdir()
    name = pictures / "..%2f..%2fetc ;rm -rf $HOME`id`.png"
    Image.new("RGB", (40, 40), "teal").save(name)
    around = content(pictures)
    command = ("tune", name, "--category", "dog", "--token", "../../up", "--backbone", tiny_folder)
    few = ("--max-train-steps", 1, "--num-samples", 1, "--device", "cpu", "--report-to", "none")
    result = say(*command, *few, "--prompt", "../{S*}/../{category}", "--out", room / "run")
    assert result.code == 0, result
    drawn = ("generate", room / "run", "../../../{S*}\\..", "--num-images", 1, "--device", "cpu")
    assert say(*drawn, "--out", room / "drawn").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"room", "pictures"}
    assert {p.name for p in room.iterdir()} == {"run", "drawn"} and content(pictures) == around


@pytest.mark.parametrize("category", ["../dog", "/etc", "a\\b", "dog\0", "{S*2}", "a=b"])
def test_a_category_that_is_no_word_is_refused(category: str, tiny: Backbone) -> None:
    tiny.facts = {}
    with pytest.raises(UserError, match="has the character"):
        tiny.check_category(category)


def test_a_link_in_place_of_a_folder_is_not_followed(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    for name in ("full", "empty", "nowhere"):
        target = tmp_path / {"full": "mine", "empty": "other", "nowhere": "gone"}[name]
        if name == "empty":
            target.mkdir()
        (tmp_path / name).symlink_to(target)
        before = content(tmp_path)
        command = ("generate", finished.folder, "a {S*}", "--num-images", 1, "--device", "cpu")
        result = say(*command, "--out", tmp_path / name)
        if result.code:
            assert "Traceback" not in result.err and content(tmp_path) == before
        else:  # the link itself gave way to the folder
            assert not (tmp_path / name).is_symlink()
        assert (tmp_path / "mine" / "letter.txt").read_text() == "mine"
        assert not list((tmp_path / "other").iterdir()) if (tmp_path / "other").exists() else True


# --- no text becomes markup ----------------------------------------------------------------------

EVIL = "<script>alert(1)</script>'\"><img src=x onerror=alert(1)>&amp;${x}"


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, frozenset[str]]] = []
        self.sources: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, frozenset(name for name, _ in attrs)))
        self.sources |= {(value or "")[:10] for name, value in attrs if name in ("src", "href")}

    def handle_data(self, data: str) -> None:
        self.text += data


def harmless(page: str, times: int) -> Page:
    parsed = Page(page)
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "svg", "a"}
    assert not [name for name in names if name.startswith("on")]
    assert parsed.sources <= {"data:image"}
    assert parsed.text.count("<script>alert(1)</script>") >= times
    return parsed


def test_the_report_of_the_demo_escapes_every_text(finished: Run) -> None:
    picture = Image.new("RGB", (8, 8))
    look = SimpleNamespace(words=lambda: EVIL)
    scene = SimpleNamespace(category=EVIL, attribute=EVIL, look=look)
    who: Any = SimpleNamespace(scene=scene, other_attributes=(EVIL, EVIL), picture=picture)
    rows = [
        {"variant": variant, "attribute": attribute, "prompt": EVIL, "image": 0}
        | dict.fromkeys(MEASURES, 0.5)
        for variant in (EVIL, "sude")
        for attribute in ("", EVIL)
    ]
    grids: Any = {name: {"as tuned": [picture], EVIL: [picture]} for name in (EVIL, "sude")}
    steps = pd.DataFrame({"step": [1, 2], "rho": 0.5, "open_gates": 1.0, "loss_sude": 0.1,
                          "tau": 0.2, "loss_subject": 0.1, "t": 1.0})  # fmt: skip
    config = TuningConfig(Path("x.png"), "dog", method=EVIL, prompt="{S*}" + EVIL)
    run: Any = SimpleNamespace(config=config, metrics=lambda: steps, environment={})
    page = demo.report(who, pd.DataFrame(rows), grids, {EVIL: run, "sude": run}, 0)
    harmless(page, 8)


def test_the_card_of_a_run_quotes_what_it_says(finished: Run, tiny: Backbone) -> None:
    import yaml

    from sude_lab.runs.export import model_card

    prompt = 'a {S*}"\n---\nlicense: mit\n'
    config = replace(finished.config, category="<img src=x onerror=alert(1)> [a](b) dog")
    card = model_card(config, tiny, finished.weights, [prompt])
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["instance_prompt"] == " ".join(prompt.split()) and "license" not in head
    assert head["widget"] == [{"text": head["instance_prompt"], "output": {"url": "samples.png"}}]
    assert not re.search(r"(?<!\\)<img", card)
    assert r"\<img src=x onerror=alert\(1\)\> \[a\]\(b\) dog" in card


def test_a_message_moves_no_cursor(tmp_path: Path) -> None:
    result = say("tune", tmp_path / "\x1b[2J\x07.png", "--category", "dog", "--out", tmp_path / "x")
    assert "\x1b" not in result.err and "\x07" not in result.err and "\\x1b[2J" in result.sentence


def test_a_picture_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS is drawn by Ghostscript, where there is one."""
    import subprocess

    from sude_lab.io.pictures import load_picture

    def started(*args: object, **kwargs: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "EPS")
    for name in ("figure.eps", "figure.png"):
        (tmp_path / name).write_bytes(file.getvalue())
        with pytest.raises(UserError, match="can be read here"):
            load_picture(tmp_path / name, resolution=32)
