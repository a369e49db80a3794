"""A run's weights are those of a short loop that shares none of its code, to the last bits.

(When the loop became a class, weights and rows of 45 kinds of run were equal to the bit before and
after, on one machine; hashes of them would not be the same on another.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.draws import step_generator
from sude_lab.runs.prepare import drawn_class_images, prepared_tuning

pytestmark = pytest.mark.quick

Fresh = Callable[[], Backbone]
STEPS, BATCH, RATE, SEED = 20, 2, 1e-3, 5


def by_hand(
    backbone: Backbone, frozen: Backbone, picture: Image.Image, *, train: str, w_r: float
) -> tuple[dict[str, Tensor], list[float]]:
    """DreamBooth with SuDe (w_s 0.7, simple, frozen, truncated) and prior preservation."""
    small = picture.resize((32, 32), Image.Resampling.LANCZOS)
    (mean, std), unet = backbone.encode_pictures([small]), backbone.unet
    images = drawn_class_images(backbone, "dog", number=2, seed=SEED + 10_000) if w_r else []
    kept = torch.cat([backbone.encode_pictures([image])[0] for image in images]) if w_r else None
    abar = backbone.pipeline.scheduler.alphas_cumprod.double()
    with torch.no_grad():
        null, dog = (backbone.encode_prompts([text]).hidden for text in ("", "photo of a dog"))
        backbone.add_token("<sks>", "sks")
        subject = backbone.encode_prompts(["photo of a <sks> dog"]).hidden
    chosen = {n: p for n, p in unet.named_parameters() if train == "unet" or ".attn" in n}
    for p in chosen.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen.values(), lr=RATE, weight_decay=1e-2, fused=True)

    def eps_of(model: Any, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        return model(x, t, hidden.expand(len(x), -1, -1)).sample

    def noised(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        return a.sqrt().float() * x_0 + (1 - a).sqrt().float() * eps

    losses = []
    for number in range(1, STEPS + 1):
        g = step_generator(SEED, number)
        torch.randint(1, (BATCH,), generator=g)
        x_0 = mean + std * torch.randn((BATCH, 4, 8, 8), generator=g)
        eps = torch.randn((BATCH, 4, 8, 8), generator=g)
        t = torch.randint(1000, (BATCH,), generator=g)
        x_t = noised(x_0, eps, t)
        out = eps_of(unet, x_t, t, subject)
        with torch.no_grad():
            uncond, category = eps_of(
                frozen.unet,
                torch.cat([x_t, x_t]),
                torch.cat([t, t]),
                torch.cat([null.expand(BATCH, -1, -1), dog.expand(BATCH, -1, -1)]),
            ).chunk(2)
        of_subject = (out - eps).square().mean((1, 2, 3))
        d, a = (category - uncond).flatten(1), (out - uncond).flatten(1)
        sude = ((d - a).square().sum(1) - a.square().sum(1)) / a.shape[1]  # eq. 7
        gate = sude > -d.square().mean(1)  # eq. 8 and 9
        loss = of_subject + 0.7 * sude * gate
        if kept is not None:
            pick = torch.randint(2, (BATCH,), generator=g)
            noise = torch.randn((BATCH, 4, 8, 8), generator=g)
            guess = eps_of(unet, noised(kept[pick], noise, t), t, dog)
            loss = loss + w_r * (guess - noise).square().mean((1, 2, 3))
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(chosen.values(), 1.0)
        optimizer.step()
        losses.append(of_subject.mean().item())
    return {f"unet.{n}": p.detach() for n, p in chosen.items()}, losses


@pytest.mark.parametrize(("train", "w_r"), [("attention", 0.0), ("unet", 0.0), ("attention", 0.5)])
def test_a_run_is_the_loop_by_hand(
    train: str, w_r: float, fresh: Fresh, subject_picture: Path
) -> None:
    picture = Image.open(subject_picture).convert("RGB")
    settings = TuningConfig(
        image=subject_picture,
        category="dog",
        train=train,  # type: ignore[arg-type]
        weighting="simple",
        weight_sude=0.7,
        prior_loss_weight=w_r,
        num_class_images=2,
        learning_rate=RATE,
        train_batch_size=BATCH,
        max_train_steps=STEPS,
        seed=SEED,
    )
    steps = list(prepared_tuning(settings, fresh(), picture))
    weights, losses = by_hand(fresh(), fresh(), picture, train=train, w_r=w_r)
    start = dict(fresh().unet.named_parameters())
    theirs = steps[-1].state_dict()["trained"]
    assert theirs.keys() == weights.keys()
    apart = torch.cat([(theirs[n] - p).flatten() for n, p in weights.items()]).norm()
    moved = torch.cat([(p - start[n.removeprefix("unet.")]).flatten() for n, p in weights.items()])
    # Twenty steps of Adam make more of rounding where gradients are small; a wrong term, sign,
    # weight or gate is apart by the move itself.
    assert apart < 0.02 * moved.norm()
    assert [s.loss_subject.mean().item() for s in steps] == pytest.approx(losses, rel=1e-3)
