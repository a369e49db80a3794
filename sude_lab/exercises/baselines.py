"""Checks of the exercises to lesson 07: prompts, what a method trains, what came back, the plug."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sude_lab.evaluate.prompts import STRUCTURES, structured
from sude_lab.exercises.judging import Answer, Mistake, Trial, ask, check, choice, judge, twice
from sude_lab.exercises.worlds import short_schedule, uniform
from sude_lab.prompts import article

WORDS = (("dog", "running"), ("candle", "unlit"), ("cat", "open mouth"))


@check
def check_paper_prompt(seed: int) -> list[Trial]:
    """Check paper_prompt(structure, attribute, category): P1-P3 of arXiv 2403.06775, Table 2."""
    category, trials = WORDS[seed % 3][0], []
    for structure in STRUCTURES:
        for attribute in ("running", "open mouth"):
            right = structured(structure, category, attribute)
            slips = {
                "“an” stands before a vowel: `article(words)` knows.": right.replace(
                    f"{article(attribute)} {attribute}", f"a {attribute}"
                ),
                "The subject is missing: {S*} stays in the prompt.": right.replace("{S*} ", ""),
                "The attribute is missing.": structured(structure, category),
            }
            for other in STRUCTURES:
                says = f"That is {other}, and {structure} was asked for: where does each word go?"
                slips[says] = structured(other, category, attribute)
            slips = {says: wrong for says, wrong in slips.items() if wrong != right}
            trials.append(Trial((structure, attribute, category), right, slips))
    return trials


@check
def check_combined(seed: int) -> Trial:
    """Check combined(attributes, backgrounds, category): every attribute on every background.

    "photo of a running {S*} dog on the beach", the attributes in order, each with all backgrounds;
    the combinations of arXiv 2403.06775, section 5. A list of prompts.
    """
    category, own = WORDS[seed % 3]
    attributes, backgrounds = (
        [own, "open", "golden"],
        ["on the beach", "in the snow", "with a ball"],
    )

    def prompt(attribute: str, background: str, a: str = "") -> str:
        a = a or article(attribute)
        return f"photo of {a} {attribute} {{S*}} {category} {background}"

    pairs = [(a, b) for a in attributes for b in backgrounds]
    slips = {
        "You paired them off, the first with the first: every attribute goes with every "
        "background.": [prompt(*pair) for pair in zip(attributes, backgrounds, strict=True)],
        "All are there, in another order: the first attribute with all backgrounds, then the "
        "second.": [prompt(a, b) for b in backgrounds for a in attributes],
        "“an” stands before a vowel: `article` knows.": [prompt(*pair, "a") for pair in pairs],
        "The subject is missing: {S*} stands before the category.": (
            [prompt(*pair).replace("{S*} ", "") for pair in pairs]
        ),
        "The category is missing: it stands behind {S*}.": (
            [prompt(*pair).replace(f"{{S*}} {category}", "{S*}") for pair in pairs]
        ),
    }
    return Trial(
        (list(attributes), list(backgrounds), category), [prompt(*pair) for pair in pairs], slips
    )


check_must_know = choice(
    "b",
    "what SuDe has to know of a method to regularise it, arXiv 2403.06775, eq. 7-10.",
    {
        "a": "No: the gradient finds what is trained by itself, whatever that is.",
        "c": "No: the method makes its prediction with its own prompt, and SuDe sees the "
        "prediction.",
        "d": "No: eq. 10 adds the losses, and none of them sees the others.",
    },
)


class TinyUNet(nn.Module):
    """Names like those of a diffusers UNet, with two transformer blocks; a few hundred numbers.

    `attn1` is self-attention, `attn2` cross-attention, which reads the words. It does not run: it
    is there to choose from its parameters, as the methods of arXiv 2403.06775, section 4, do.
    """

    def __init__(self, width: int = 4, words: int = 6) -> None:
        super().__init__()

        def attention(reads: int) -> nn.ModuleDict:
            sides = {"to_q": (width, width), "to_k": (reads, width), "to_v": (reads, width)}
            layers = {name: nn.Linear(*side, bias=False) for name, side in sides.items()}
            out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
            return nn.ModuleDict(layers | {"to_out": out})

        def block() -> nn.ModuleDict:
            parts = {"attn1": attention(width), "attn2": attention(words)}
            return nn.ModuleDict(parts | {"ff": nn.Linear(width, width)})

        self.conv_in = nn.Conv2d(4, width, 3)
        self.down_blocks = nn.ModuleList([block()])
        self.up_blocks = nn.ModuleList([block()])


def check_keys_and_values(answer: Answer, *, seed: int = 0) -> None:
    """Check keys_and_values(unet): train K and V of every cross-attention, and nothing else.

    What Custom Diffusion trains (arXiv 2212.04488, section 3.1). Gradients are switched on and off
    in place; the answer returns how many numbers are trained.
    """
    unet = TinyUNet(4 + seed)
    given = ask(answer, unet)
    names = [name for name, _ in unet.named_parameters()]
    on = torch.tensor([p.requires_grad for p in unet.parameters()])
    sizes = torch.tensor([p.numel() for p in unet.parameters()]).double()

    def where(*parts: str, within: str = "attn2") -> Tensor:
        return torch.tensor([within in n and any(f".{p}." in n for p in parts) for n in names])

    right = where("to_k", "to_v")
    slips = {
        "Everything learns: switch the gradients of all others off, `requires_grad_(False)`.": (
            torch.ones(len(names), dtype=torch.bool)
        ),
        "Nothing learns: switch K and V of `attn2` on, `requires_grad_(True)`.": (
            torch.zeros(len(names), dtype=torch.bool)
        ),
        "attn1 is self-attention, in which the picture reads itself: words come in by attn2.": (
            where("to_k", "to_v", within="attn")
        ),
        "That is attn1, self-attention: take attn2.": where("to_k", "to_v", within="attn1"),
        "The queries learn, too, the picture's side: leave to_q out.": (
            where("to_q", "to_k", "to_v")
        ),
        "The whole cross-attention learns: K and V alone are asked for.": where(
            "to_q", "to_k", "to_v", "to_out"
        ),
        "Only the keys learn: the values, too.": where("to_k"),
    }
    for says, wrong in slips.items():
        if torch.equal(on, wrong):
            raise Mistake(says)
    if not torch.equal(on, right):
        first = names[int((on != right).nonzero()[0, 0])]
        raise Mistake(f"{first} should {'learn' if right[names.index(first)] else 'stay'}.")
    slips = {
        "That is how many tensors are trained: count their numbers, `.numel()`.": right.sum(),
        "That counts the whole UNet: what is trained alone.": sizes.sum(),
    }
    judge(given, (sizes * right).sum(), slips)


@check
def check_given_back(seed: int) -> Trial:
    """Check given_back(lost, gained): the share of what tuning lost that SuDe gave back.

    sum gained / sum lost over the subjects of a method, no unit. lost, gained: (S,). No equation.
    """
    g = torch.Generator().manual_seed(seed)
    lost = torch.tensor([0.5, 0.4, 0.02, 0.6]).double() + 0.05 * uniform(g, 0, 1, 4)
    gained = torch.tensor([0.3, 0.1, -0.03, 0.5]).double() + 0.05 * uniform(g, 0, 1, 4)
    slips = {
        "You averaged ratios: a subject that lost next to nothing decides then, whatever its "
        "luck. Take the ratio of the sums.": (gained / lost).mean(),
        "Upside down: gained over lost.": lost.sum() / gained.sum(),
        "That is what was gained on average; relative to what was lost, please.": gained.mean(),
        "One number for the method is asked for.": gained / lost,
        "That is the share that is still lost.": 1 - gained.sum() / lost.sum(),
    }
    return Trial((lost, gained), gained.sum() / lost.sum(), slips)


class TinyPlugUNet(nn.Module):
    """A noise network that is called as a diffusers UNet is: (x_t, t, embeddings) -> `.sample`.

    The epsilon form of x_theta in arXiv 2403.06775, eq. 2: x_t (B, C, h, w), t (B,), embeddings
    (B, L, D). The same weights for the same seed.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.picture = nn.Conv2d(2, 2, 3, padding=1)
            self.words = nn.Linear(3, 2)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> object:
        """Return an object whose `sample` is the predicted noise, as diffusers' UNets do."""
        words = self.words(encoder_hidden_states).mean(1)[..., None, None]
        return SimpleNamespace(sample=self.picture(sample) * (1 + words) + words)


@twice
def check_plug(answer: Answer, *, seed: int = 0) -> None:
    """Check plug(unet, x_t, t, model_pred, class_embeds, uncond_embeds): SuDe for any loop, (B,).

    lambda_tau L_sude of arXiv 2403.06775, eq. 7-9, in eps-space with the `simple` weighting and the
    prior `current`, squares as means over dimensions; compared with the library's
    `SudeRegularizer`, values and gradients of the UNet's weights. embeds: (B, L, D).
    """
    from sude_lab.sude import SudeRegularizer  # here: it imports diffusers, which is slow

    g = torch.Generator().manual_seed(seed)
    unet, schedule = TinyPlugUNet(seed), short_schedule()
    dog, nothing = (2 * torch.randn(1, 4, 3, generator=g) for _ in range(2))
    x_t, t = torch.randn(6, 2, 4, 4, generator=g), torch.randint(100, (6,), generator=g)
    along = torch.tensor([-0.4, 0.1, 0.5, 0.8, 1.3, 1.9])
    mixed = nothing + along[:, None, None] * (dog - nothing)  # subjects from "nothing" past "dog"
    weights = list(unet.parameters())

    def prediction() -> Tensor:
        return unet(x_t, t, mixed).sample

    library = SudeRegularizer(
        unet, schedule, dog, nothing, prior="current", weighting="simple", truncated=True
    )
    pred = prediction()
    terms = library.terms(x_t, t, pred)
    with torch.no_grad():
        swapped = SudeRegularizer(
            unet, schedule, nothing, dog, prior="current", weighting="simple"
        ).terms(x_t, t, pred)
    embeds = (dog.expand(6, -1, -1), nothing.expand(6, -1, -1))
    model_pred = prediction()
    value = ask(answer, unet, x_t, t, model_pred, *embeds)
    judge(
        value,
        terms.gated,
        {
            "The gate is missing: eq. 9 gives 0 where L_sude <= tau.": terms.loss,
            "The gate is the wrong way round: open is L_sude > tau.": terms.loss * ~terms.gate,
            "Class and no prompt are exchanged.": swapped.gated,
            "You summed the squares: take their mean over the dimensions, as the MSE of the loop "
            "does.": 32 * terms.gated,
            "That is the hinge: leave - tau out.": (terms.loss - terms.threshold) * terms.gate,
            "That is the gate: times L_sude.": terms.gate,
            "One number a sample is asked for; the loop averages them.": terms.gated.mean(),
        },
    )
    right = torch.autograd.grad(terms.gated.mean(), weights)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise Mistake("The values are right, but no gradient reaches the UNet by `model_pred`.")
    slopes = torch.autograd.grad(value.mean(), weights, allow_unused=True)
    if not all(
        s is not None and torch.allclose(s, r, rtol=1e-3, atol=1e-6)
        for s, r in zip(slopes, right, strict=True)
    ):
        raise Mistake(
            "The values are right, but a gradient flows through the predictions for the class or "
            "for no prompt: make both under `torch.no_grad()`."
        )


def plug_batch(seed: int = 0) -> tuple[TinyPlugUNet, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return a tiny UNet and (x_t, t, model_pred, class_embeds, uncond_embeds) to try a plug on."""
    g = torch.Generator().manual_seed(seed)
    unet = TinyPlugUNet(seed)
    dog, nothing = (2 * torch.randn(1, 4, 3, generator=g).expand(5, -1, -1) for _ in range(2))
    x_t, t = torch.randn(5, 2, 4, 4, generator=g), torch.randint(100, (5,), generator=g)
    subject = nothing + torch.linspace(-0.5, 2, 5)[:, None, None] * (dog - nothing)
    return unet, (x_t, t, unet(x_t, t, subject).sample, dog, nothing)
