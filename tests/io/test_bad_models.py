"""Pipelines and weights that are broken, foreign or hostile: refused in a sentence, nothing run."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import content, generated, say
from safetensors.torch import load_file, save_file

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.opening import FACTS_FILE, open_backbone
from sude_lab.runs.folder import CHECKPOINT, Run, _read_checkpoint, run_tuning

Change = Callable[[Path], None]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def tensors(file: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        state = {n: p.clone() for n, p in load_file(folder / file).items()}  # it is written over
        change(state)
        save_file(state, folder / file, metadata={"format": "pt"})

    return apply


def settings(file: str, **values: Any) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return apply


def written(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data) and None


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(next(key for key in state if name in key))


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({k: change(v) for k, v in state.items()})


def pickled(folder: Path) -> None:
    """The weights as a pickle alone; opening it would leave a file behind."""
    torch.save(load_file(folder / UNET), folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


def flow(folder: Path) -> None:
    name = "FlowMatchEulerDiscreteScheduler"
    settings("model_index.json", scheduler=["diffusers", name])(folder)
    written("scheduler/scheduler_config.json", json.dumps({"_class_name": name}).encode())(folder)


SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
PIPELINES: dict[str, tuple[Change, str]] = {
    "no weights": (lambda f: (f / UNET).unlink(), "with safetensors weights"),
    "a pickle": (pickled, "with safetensors weights"),
    "no configuration": (lambda f: (f / "unet/config.json").unlink(), "could not be opened"),
    "no words": (lambda f: shutil.rmtree(f / "tokenizer") or (f / "tokenizer").mkdir(),
                 "tokenizer has no tokenizer.json or vocab.json"),
    "UNet lacks a tensor": (tensors(UNET, without("attn2.to_k")), "unet lacks the tensor"),
    "VAE lacks a tensor": (tensors(VAE, without("conv_in.weight")), "vae lacks the tensor"),
    "text encoder lacks a tensor": (tensors(TEXT, without("k_proj.weight")),
                                    "text_encoder lacks the tensor"),
    "whole numbers": (tensors(UNET, every(lambda x: x.int())), "no floating-point numbers"),
    "not finite": (tensors(TEXT, every(lambda x: x / 0)), "values that are not finite"),
    "shapes": (settings("unet/config.json", cross_attention_dim=64), "could not be opened"),
    "inpainting": (settings("unet/config.json", in_channels=9), "could not be opened"),
    "no weights in the file": (written(UNET, b"weights"), "could not be opened"),
    "claims 2^60 bytes": (written(UNET, struct.pack("<Q", 2**60) + b"{}"), "could not be opened"),
    "no size": (settings("unet/config.json", sample_size=None), "sample_size is None"),
    "no such prediction": (settings(SCHEDULER, prediction_type="score"), "prediction_type"),
    "no timesteps": (settings(SCHEDULER, num_train_timesteps=0), "could not be opened"),
    "flow matching": (flow, "is for transformers of flow matching"),
    "Flux": (settings(INDEX, _class_name="FluxPipeline"), "a FluxPipeline, which is distilled"),
    "text only": (written(INDEX, b'{"_class_name": null}'), "holds a None"),
    "a list": (settings(INDEX, _class_name=["module", "Pipeline"]), "it must be one of"),
    "code of the system": (settings(INDEX, unet=["os", "system"]), "takes its unet from"),
    "code of the folder": (settings(INDEX, unet=["unet_code", "UNet"]), "takes its unet from"),
    "code by a tokenizer": (settings(INDEX, tokenizer=["transformers", "AutoTokenizer"]),
                            "takes its tokenizer from"),
    "code by a model": (settings(INDEX, unet=["diffusers", "AutoModel"]), "takes its unet from"),
    "another text encoder": (settings(INDEX, text_encoder=["transformers", "T5EncoderModel"]),
                             "takes its text_encoder from"),
    "words without end": (settings(TOKENIZER, model_max_length=10**30), "model_max_length"),
    "deep index": (written(INDEX, b"[" * 10**5), "the folder is damaged"),
    "deep facts": (written(FACTS_FILE, b"[" * 10**5), "the file is damaged"),
    "facts of another kind": (written(FACTS_FILE, b'{"generation": {"eta": 1}}'), "is damaged"),
    "a tuning default": (written(FACTS_FILE, b'{"tuning":{"dreambooth":{"seed":0,"train":"all"}}}'),
                         "--train is 'all'"),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_that_is_not_whole_is_refused(
    name: str, tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    change, reason = PIPELINES[name]
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_folder, folder)
    if name == "code of the folder":
        (folder / "unet_code.py").write_text(
            f"import pathlib; pathlib.Path({str(tmp_path / 'run-by-import')!r}).touch()"
        )
    change(folder)
    before = content(tmp_path)
    command = ("tune", subject_picture, "--category", "dog", "--backbone", folder)
    few = ("--max-train-steps", 1, "--num-samples", 0, "--report-to", "none", "--device", "cpu")
    sentence = say(*command, *few, "--out", tmp_path / "new" / "run").sentence
    assert reason in sentence and (str(folder) in sentence or "--train" in sentence)
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read_right(
    kind: torch.dtype, tiny_folder: Path, tiny: Backbone, tmp_path: Path
) -> None:
    """The text encoder's stay in the file's precision if they are let: then the parts disagree."""
    shutil.copytree(tiny_folder, tmp_path / "other")
    for file in (UNET, VAE, TEXT):
        tensors(file, every(lambda x: x.to(kind) if x.is_floating_point() else x))(
            tmp_path / "other"
        )
    other = open_backbone(tmp_path / "other", device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        module, theirs = getattr(other, part, None), getattr(tiny, part, None)
        module, theirs = module or other.pipeline.vae, theirs or tiny.pipeline.vae
        for (name, p), q in zip(module.named_parameters(), theirs.parameters(), strict=True):
            assert p.dtype == torch.float32, name
            torch.testing.assert_close(p, q.to(kind).float(), rtol=0, atol=0)
    x_t, t = torch.ones(1, 4, 8, 8), torch.tensor([5])
    got = other.predict(x_t, t, other.encode_prompts(["photo of a dog"]))
    expected = tiny.predict(x_t, t, tiny.encode_prompts(["photo of a dog"]))
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


# --- weights of a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    tiny_folder: Path, subject_picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A finished run of some methods; do not write in them."""
    made = {}
    kinds: dict[str, dict[str, Any]] = {
        "textual_inversion": {},
        "vico": {},
        "dreambooth": {"train": "lora"},
    }
    for method, options in kinds.items():
        config = TuningConfig(
            subject_picture, "dog", str(tiny_folder), method, max_train_steps=1, device="cpu",
            weight_sude=0.0, **options,
        )  # fmt: skip
        out = tmp_path_factory.mktemp("weights") / method
        quiet: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}
        made[method] = run_tuning(config, out, **quiet).folder
    return made


def header(content_of_it: Any, data: bytes = b"", claims: int | None = None) -> bytes:
    text = content_of_it if isinstance(content_of_it, bytes) else json.dumps(content_of_it).encode()
    return struct.pack("<Q", len(text) if claims is None else claims) + text + data


HEADERS = st.one_of(
    st.binary(max_size=60),
    st.builds(header, st.binary(max_size=40), st.binary(max_size=20), st.integers(0, 2**64 - 1)),
    st.builds(
        lambda name, kind, shape, start, end, data, about: header(
            {name: {"dtype": kind, "shape": shape, "data_offsets": [start, end]}}
            | ({"__metadata__": about} if about is not None else {}),
            data,
        ),
        st.sampled_from(["<sks>", "references", "x", "../x", ""]),
        st.sampled_from(["F32", "F16", "I64", "BOOL", "F128", "", "U8"]),
        st.lists(st.integers(-1, 40) | st.just(2**62), max_size=4),
        st.sampled_from([0, -1, 4]),
        st.sampled_from([0, 4, 128, 2**62]),
        st.sampled_from([b"", bytes(4), bytes(128)]),
        st.none()
        | st.dictionaries(
            st.sampled_from(["token", "tokens"]),
            st.sampled_from(["<sks>", "[1]", '["<sks>"]', "{}", "dog", "a b", "", "\x1b[2J", "[[["])
            | st.text(max_size=70),
            max_size=2,
        ),
    ),
)


@generated(60)
@given(
    method=st.sampled_from(["textual_inversion", "vico", "dreambooth"]),
    pick=st.integers(0, 2),
    data=HEADERS,
)
def test_any_bytes_as_weights(
    method: str,
    pick: int,
    data: bytes,
    runs: dict[str, Path],
    fresh: Callable[[], Backbone],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """In place of one file of a run's weights: loaded, or one sentence."""
    room = tmp_path_factory.getbasetemp() / "any"
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(runs[method], room)
    files = sorted((room / "weights").iterdir())
    files[pick % len(files)].write_bytes(data)
    backbone = fresh()
    try:
        Run.open(room).load(backbone=backbone)
    except UserError as error:
        assert str(error).isprintable() and str(error).endswith(".")


@generated(24)
@given(
    method=st.sampled_from(["textual_inversion", "vico", "dreambooth"]),
    pick=st.integers(0, 2),
    keep=st.floats(0, 0.999),
)
def test_weights_cut_short_are_refused(
    method: str,
    pick: int,
    keep: float,
    runs: dict[str, Path],
    fresh: Callable[[], Backbone],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    room = tmp_path_factory.getbasetemp() / "cut"
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(runs[method], room)
    files = sorted((room / "weights").iterdir())
    file = files[pick % len(files)]
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(UserError):
        Run.open(room).load(backbone=fresh())


@pytest.mark.parametrize("method", ["textual_inversion", "vico", "dreambooth"])
def test_weights_of_other_shapes_are_refused(
    method: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """From the command line: one sentence, no picture, no file changed."""
    for number, file in enumerate(sorted((runs[method] / "weights").iterdir())):
        room = tmp_path / f"run-{number}"
        shutil.copytree(runs[method], room)
        state = load_file(file)
        name = max(state, key=lambda n: state[n].numel())
        state[name] = torch.zeros(3, 5, 7)
        save_file(state, room / "weights" / file.name, metadata={"token": "<sks>"})
        before = content(tmp_path)
        command = ("generate", room, "photo of a {S*}", "--device", "cpu", "--num-images", 1)
        assert say(*command, "--out", tmp_path / "new").sentence
        assert content(tmp_path) == before


def test_weights_as_a_pickle_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    room = tmp_path / "run"
    shutil.copytree(runs["textual_inversion"], room)
    for file in (room / "weights").iterdir():
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    before = content(tmp_path)
    sentence = say(
        "generate", room, "a {S*}", "--device", "cpu", "--out", tmp_path / "new"
    ).sentence
    assert "no safetensors, the only weights that are read" in sentence
    assert content(tmp_path) == before


@generated(80)
@given(keep=st.floats(0, 1), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255))))
def test_a_damaged_checkpoint_is_read_or_refused(
    keep: float, changes: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / CHECKPOINT
    state = {"step": 1, "trained": {"a": torch.ones(4)}, "optimizer": {}, "rows": [{"step": 1}]}
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data[: int(keep * len(data))])
    try:
        checkpoint = _read_checkpoint(path)
    except UserError as error:
        assert CHECKPOINT in str(error)
    else:
        assert isinstance(checkpoint["step"], int) and isinstance(checkpoint["rows"], list)


@pytest.mark.parametrize("wrong", [{"step": "1"}, {"rows": None}, {"trained": 3}, {"step": True}])
def test_a_checkpoint_of_other_kinds_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    state = {"step": 1, "trained": {}, "optimizer": {}, "rows": []} | wrong
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(UserError, match="no checkpoint of this version"):
        _read_checkpoint(tmp_path / CHECKPOINT)
