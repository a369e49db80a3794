"""Write the embedded model's card: what it was trained on, how long, and what the oracle sees.

python -m studies.embedded.card --num-images 16
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from tqdm.auto import tqdm

from studies.embedded.dataset import RARE_TOKENS
from sude_lab.evaluate.statistics import wilson_interval
from sude_lab.generation import generate, sampling_settings
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import data_folder, open_backbone
from sude_lab.io.reading import read_json
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world
from sude_lab.world.oracle import judge, labels, load_oracle


@dataclass(frozen=True)
class CardConfig:
    """How many pictures the table counts."""

    num_images: int = 16
    seed: int = 0
    notes: Path = Path("data/embedded/training.md")
    """What only the one who trained knows: steps, time, machine."""


def alignment_table(num_images: int, seed: int) -> pd.DataFrame:
    """Return, for every (category, attribute), the oracle's mean probabilities on base samples."""
    base, oracle = open_backbone(), load_oracle()
    rows = []
    pairs = [(c, a) for c in world.CATEGORIES for a in world.ATTRIBUTES[c]]
    for category, attribute in tqdm(pairs, desc="base samples", unit="prompt"):
        prompt = photo_of(f"{attribute} {category}")
        images = generate(base, prompt, num_images=num_images, seed=seed, batch_size=16)
        # What the prompt asks for; the look is anyone's, and not counted here.
        scene = world.sample_scene(random.Random(0), category)
        reading = judge(oracle, images, scene, attribute)
        rows.append(
            {
                "category": category,
                "attribute": attribute,
                "prompt": prompt,
                "attribute_alignment": round(reading.attribute_alignment.mean().item(), 3),
                "category_alignment": round(reading.category_alignment.mean().item(), 3),
                "pictures": num_images,
            }
        )
    return pd.DataFrame(rows)


def held_out_table() -> pd.DataFrame:
    """Return the oracle's share of right answers, and how many scenes each is a share of.

    A head is judged on the scenes that show it: a single-coloured thing has no second colour.
    """
    folder = data_folder() / "oracle"
    settings = read_json(folder / "training.json")
    names = (f"held-out-{settings['seed']}-{k}" for k in range(int(settings["held_out"])))
    truth = [labels(world.sample_scene(random.Random(name))) for name in names]
    table = pd.read_csv(folder / "held_out_accuracy.csv")
    table.insert(1, "scenes", [sum(scene[head] >= 0 for scene in truth) for head in table["head"]])
    right = (table["decoded"] * table["scenes"]).round().astype(int)
    shares = map(wilson_interval, right, table["scenes"])
    return table.assign(interval=[f"[{share.low:.3f}, {share.high:.3f}]" for share in shares])


def main(config: CardConfig) -> None:
    """Measure and write `README.md` and `alignment.csv` into the pipeline's folder."""
    folder = data_folder() / "embedded"
    table = alignment_table(config.num_images, config.seed)
    with atomic_write(folder / "alignment.csv") as path:
        table.to_csv(path, index=False)
    held = held_out_table()
    settings = sampling_settings(open_backbone().facts)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 2**20
    text = f"""# The embedded model

A `StableDiffusionPipeline` of {size:.0f} MiB, trained from nothing on pictures that we draw:
`StableDiffusionPipeline.from_pretrained("data/embedded")` is all it needs. It is meant for learning
and testing SuDe on a laptop; it can draw nothing but its own world.

## Data
Drawings of {world.RESOLUTION} x {world.RESOLUTION} pixels by `sude_lab.world.drawing`, made
for this project, with the captions of `caption`.
Categories: {", ".join(world.CATEGORIES)}. Attributes:
{"; ".join(f"{c}: {', '.join(a)}" for c, a in world.ATTRIBUTES.items())}. Backgrounds:
{", ".join(world.BACKGROUNDS)}. Companions: {", ".join(world.COMPANIONS)}. Captions name the private
look (colours, pattern, collar or base) half of the time, drop every part at random and are empty in
10 % of cases. The words {", ".join(RARE_TOKENS)} are in the vocabulary and in no caption.

## Training
{config.notes.read_text(encoding="utf-8").strip()}

Drawn with DDIM, {settings["num_inference_steps"]} steps, guidance {settings["guidance_scale"]}.

## Oracle
`data/oracle`, a small convolutional network, judges what pictures show. Share of right answers on
held-out scenes (of a head, those that show it), as drawn and as the autoencoder renders them with
latent noise, with the 95 % interval (Wilson's) of the latter:

{held.to_markdown(index=False)}

What it sees in this model's own samples, {config.num_images} pictures a prompt, seed {config.seed},
mean probability of the attribute among those of its category (mean
{table["attribute_alignment"].mean():.3f}, lowest {table["attribute_alignment"].min():.3f}), and of
the category:
`python -m studies.embedded.card --num-images {config.num_images} --seed {config.seed}`

{table.drop(columns="pictures").to_markdown(index=False)}

## Limits
Flat drawings of nine things, always facing right, one of each: no photos, no people, no text.
The oracle was trained on the same world and shares its blind spots.
"""
    with atomic_write(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(CardConfig))
