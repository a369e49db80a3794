"""The study of the implicit classifier: what it asks, eq. 5 written out, and its tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from studies import classify as study
from studies import naming
from studies.classify_tables import accuracy_table, beside
from sude_lab.backbone import Backbone
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world


def test_drawings_show_the_twenty_prompts_in_turn() -> None:
    assert len(set(naming.SHOWN)) == 20 and {c for c, _ in naming.SHOWN} == set(world.CATEGORIES)
    shown = [study.scene("reported", k) for k in range(40)]
    assert [(s.category, s.attribute) for s in shown] == [*naming.SHOWN] * 2
    assert shown[0] == study.scene("reported", 0)
    assert shown[0] not in (shown[20], study.scene("development", 0))


def test_every_way_is_asked_once_and_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study.ClassifyConfig(
        out=tmp_path / "classify.csv",
        num_pictures=1,
        num_pairs=2,
        num_times=2,
        device="cpu",
        backbone=str(tiny_folder),
    )
    one = study.run_study(config, chunk=2)
    two = study.run_study(replace(config, num_pictures=2), chunk=2)
    pd.testing.assert_frame_equal(two[two["picture"] == 0], one)
    ways = two.groupby(["prompts", "form"]).size().to_dict()
    assert ways == {
        ("attributes", "oracle"): 2,
        ("attributes", "all pairs"): 2,
        ("attributes", "pruned"): 2,
        ("attributes", "pruned, caution 1.5"): 2,
        ("attributes", "pruned, caution 4"): 2,
        ("attributes", "first pairs"): 2,
        ("categories", "oracle"): 2,
        ("categories", "all pairs"): 2,
        ("categories", "one step"): 4,
        ("categories", "one step, mean"): 4,
    }
    asked = two[two["prompts"] == "attributes"].pivot(
        index="picture", columns="form", values="evaluations"
    )
    assert (asked["all pairs"] == 40).all() and (asked["pruned"] <= 30).all()
    assert (two.loc[two["form"] == "oracle", "right"] == 1).all()
    monkeypatch.setattr(study, "open_backbone", lambda *a, **k: pytest.fail("opened again"))
    study.main(replace(config, num_pictures=2))
    text = config.out.with_suffix(".md").read_text(encoding="utf-8")
    assert "2 drawings" in text and "x_{t-1} at its mean" in text


def test_one_step_is_eq_5_written_out(tiny: Backbone) -> None:
    pictures = [world.draw(study.scene("reported", 7))]
    every = naming.name_categories(tiny, pictures, 7, num_times=2, seed=3)
    rows = [row for row in every if row["form"] != "all pairs"]
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 500_007)
    noise, again = torch.randn((2, 2, 4, 16, 16), generator=generator).double().numpy()
    abar = np.asarray(tiny.pipeline.scheduler.alphas_cumprod, dtype=np.float64)
    x_0 = tiny.encode_pictures(pictures)[0][0].double().numpy()
    assert len(rows) == 4 and rows[0]["t"] == rows[2]["t"]
    for row in rows:
        t, m = row["t"], [r["t"] for r in rows[:2]].index(row["t"])
        alpha = abar[t] / abar[t - 1]
        x_t = np.sqrt(abar[t]) * x_0 + np.sqrt(1 - abar[t]) * noise[m]
        variance = (1 - alpha) * (1 - abar[t - 1]) / (1 - abar[t])
        x_prev = np.sqrt(abar[t - 1]) * (1 - alpha) * x_0 + np.sqrt(alpha) * (1 - abar[t - 1]) * x_t
        x_prev = x_prev / (1 - abar[t])
        if row["form"] == "one step":
            x_prev = x_prev + np.sqrt(variance) * again[m]
        logits = []
        for category in world.CATEGORIES:
            with torch.no_grad():
                words = tiny.encode_prompts([photo_of(category)]).hidden
                sample = torch.tensor(x_t[None], dtype=torch.float32)
                out = tiny.unet(sample, torch.tensor([t]), encoder_hidden_states=words)
            eps = out.sample[0].double().numpy()
            mean = (x_t - (1 - alpha) / np.sqrt(1 - abar[t]) * eps) / np.sqrt(alpha)
            logits.append(-((x_prev - mean) ** 2).sum() / (2 * variance))
        p = np.exp(np.array(logits) - max(logits))
        p = p / p.sum()
        assert row["named"] == world.CATEGORIES[int(p.argmax())]
        assert row["probability"] == pytest.approx(p.max(), abs=2e-3)


def test_the_table_counts_pairs_of_answers() -> None:
    right = {
        "all pairs": [1] * 8 + [0, 1],
        "pruned": [1] * 7 + [0, 1, 0],
        "first pairs": [1] * 10,
        "oracle": [1] * 10,
    }
    cost = {"all pairs": 200, "pruned": 40, "first pairs": 40, "oracle": 0}
    table = pd.DataFrame(
        [
            {
                "picture": k,
                "prompts": "attributes",
                "form": form,
                "right": value,
                "probability": 0.9,
                "evaluations": cost[form],
            }
            for form, values in right.items()
            for k, value in enumerate(values)
        ]
    )
    rows = accuracy_table(table).set_index("asked")
    assert rows.loc["all pairs", "accuracy"].startswith("0.900 [")
    assert rows.loc["pruned", "times fewer"] == "5.00"
    assert rows.loc["pruned", "difference to all pairs"].startswith("-0.100 [")
    assert rows.loc["pruned", "only one right"] == "2 / 1"
    assert rows.loc["first pairs", "only one right"] == "0 / 1"
    assert rows.loc["oracle", "UNet evaluations"] == ""


def test_two_models_are_compared_on_the_drawings_that_both_named() -> None:
    def answers(right: list[int]) -> pd.DataFrame:
        forms = [("attributes", "all pairs"), ("attributes", "pruned"), ("categories", "all pairs")]
        return pd.DataFrame(
            [
                {"picture": k, "prompts": prompts, "form": form, "right": value}
                for prompts, form in forms
                for k, value in enumerate(right)
            ]
        )

    text = beside(answers([1, 1, 1, 0]), answers([1, 0, 0, 1, 1, 1]), "other.csv")
    row = next(line for line in text.splitlines() if "pruned" in line)
    assert row.split("|")[3].strip() == "4"  # two of the six were not asked here
    assert "0.750 [" in row and "0.500 [" in row and "+0.250 [" in row and "1 / 2" in row
    same = beside(answers([1, 0]), answers([1, 0]), "other.csv")
    assert "+0.000 [" in same and "0 / 0" in same
