"""The study that trains the embedded flow model: its parts, its file of weights, its checkpoint."""

import importlib.util
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from studies.embedded.dataset import caption

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def flow() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flow", ROOT / "studies/embedded/flow.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["flow"] = module
    spec.loader.exec_module(module)
    return module


def small(flow, work, **settings):
    """A training of a few seconds."""
    known = {"pictures": 24, "width": 32, "layers": 2, "batch_size": 4, "steps": 6, "warmup": 2}
    source = ROOT / "data/embedded"
    return flow.FlowConfig(out=work / "out", work=work, source=source, **(known | settings))


def drawings(flow, config, pipeline):
    vocab = json.loads((config.source / "tokenizer/vocab.json").read_text("utf-8"))
    chunk = flow.draw_chunk((config.seed, 0, config.pictures, vocab))

    class Chunks:
        def next(self, timeout):
            return chunk

    drawn = flow.Drawings(config, Chunks(), pipeline.vae, torch.device("cpu"))
    drawn.wait(config.pictures)
    return drawn


def run(training, drawn, until):
    training.__class__ = type("Short", (type(training),), {"progress": lambda t: t.step / until})
    assert not list(training.run(drawn))


def test_the_folder_opens_and_draws_in_plain_diffusers(flow, tmp_path):
    config = small(flow, tmp_path)
    pipeline = flow.build_pipeline(config)
    flow.write_pipeline(pipeline, config, "a card")
    plain = StableDiffusion3Pipeline.from_pretrained(config.out)
    plain.set_progress_bar_config(disable=True)
    image = plain("photo of a dog", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert plain.tokenizer_3(["photo of a dog", ""]).input_ids == [[2, 1], [1]]
    facts = json.loads((config.out / "sude_lab.json").read_text("utf-8"))
    assert "glass" in facts["words"]
    shipped = json.loads((ROOT / "data/embedded_flow/sude_lab.json").read_text("utf-8"))
    assert facts == shipped


def test_texts_are_those_of_the_pipeline(flow, tmp_path):
    config = small(flow, tmp_path)
    pipeline = flow.build_pipeline(config)
    flow.check_words(pipeline, config)
    rng = random.Random(3)
    texts = [caption(flow.world.sample_scene(rng), rng) for _ in range(12)]
    hidden, _, pooled, _ = pipeline.encode_prompt(texts, None, None, max_sequence_length=2)
    ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    ours = flow.Texts(pipeline)(ids, 2)
    assert torch.equal(ours[0], hidden) and torch.equal(ours[1], pooled)
    assert hidden[:, -2:].abs().max() == 0
    assert 0.7 < pooled.std() < 1.5


def test_a_resumed_training_is_an_uninterrupted_one(flow, tmp_path):
    ends = []
    for name, stops in (("once", (6,)), ("twice", (3, 6))):
        config = small(flow, tmp_path / name)
        config.work.mkdir()
        for stop in stops:
            pipeline = flow.build_pipeline(config)
            training = flow.Training(config, pipeline, torch.device("cpu"))
            training.rate = lambda: 1.0
            run(training, drawings(flow, config, pipeline), stop)
            training.save()
        ends.append(training)
    assert [e.step for e in ends] == [6, 6] and len({e.samples for e in ends}) == 1
    for key in ("parameters", "averages"):
        for a, b in zip(*(getattr(e, key) for e in ends), strict=True):
            assert torch.equal(a, b)


def test_the_learning_rate_rises_stays_and_falls(flow, tmp_path):
    config = small(flow, tmp_path, steps=100, warmup=10)
    training = flow.Training(config, flow.build_pipeline(config), torch.device("cpu"))
    rates = []
    for training.step in range(101):
        rates.append(training.rate())
    assert rates[0] == pytest.approx(0.1) and rates[10:31] == [1.0] * 21
    assert all(a > b for a, b in pairwise(rates[30:])) and rates[-1] == pytest.approx(0.01)
