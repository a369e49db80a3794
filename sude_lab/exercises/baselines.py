"""Checks of the exercises to lesson 07; equations of arXiv 2403.06775 unless named."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sude_lab.evaluate.prompts import STRUCTURES, structured
from sude_lab.exercises.judging import Answer, Draw, Mistake, Trial, ask, check, choice
from sude_lab.exercises.worlds import short_schedule
from sude_lab.prompts import article

WORDS = (("dog", "running"), ("candle", "unlit"), ("cat", "open mouth"))


@check
def check_paper_prompt(draw: Draw) -> list[Trial]:
    """Check paper_prompt(structure, attribute, category): P1-P3 of Table 2."""
    category, trials = WORDS[draw.seed % 3][0], []
    for structure in STRUCTURES:
        for attribute in ("running", "open mouth"):
            right = structured(structure, category, attribute)
            with_a = right.replace(f"{article(attribute)} {attribute}", f"a {attribute}")
            slips = {
                "“an” stands before a vowel: `article(words)` knows.": with_a,
                "The subject is missing: {S*} stays in the prompt.": right.replace("{S*} ", ""),
                "The attribute is missing.": structured(structure, category),
            }
            for other in STRUCTURES:
                says = f"That is {other}, and {structure} was asked for: where does each word go?"
                slips[says] = structured(other, category, attribute)
            trials.append(Trial((structure, attribute, category), right, slips))
    return trials


@check
def check_combined(draw: Draw) -> Trial:
    """Check combined(attributes, backgrounds, category): each attribute on each background."""
    category, own = WORDS[draw.seed % 3]
    attributes = [own, "open", "golden"]
    backgrounds = ["on the beach", "in the snow", "with a ball"]

    def prompt(attribute: str, background: str, a: str = "") -> str:
        a = a or article(attribute)
        return f"photo of {a} {attribute} {{S*}} {category} {background}"

    pairs = [(a, b) for a in attributes for b in backgrounds]
    right = [prompt(*pair) for pair in pairs]
    by_background = [prompt(a, b) for b in backgrounds for a in attributes]

    def without(part: str) -> list[str]:
        return [line.replace(part, "") for line in right]

    slips = {
        "You paired them off: every attribute goes with every background.": right[::4],
        "All are there, in another order: the first attribute with all backgrounds.": by_background,
        "“an” stands before a vowel: `article` knows.": [prompt(*pair, "a") for pair in pairs],
        "The subject is missing: {S*} stands before the category.": without("{S*} "),
        "The category is missing: it stands behind {S*}.": without(f" {category}"),
    }
    return Trial((attributes, backgrounds, category), right, slips)


check_must_know = choice(
    "b",
    "what SuDe has to know of a method to regularise it, eq. 7-10.",
    a="No: the gradient finds what is trained by itself, whatever that is.",
    c="No: the method predicts with its own prompt, and SuDe sees the prediction.",
    d="No: eq. 10 adds the losses, and none of them sees the others.",
)


class TinyUNet(nn.Module):
    """A diffusers UNet's names, to choose from: `attn1` self-, `attn2` cross-attention (words)."""

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


@check
def check_keys_and_values(draw: Draw) -> Trial:
    """Check keys_and_values(unet): train K and V of `attn2` alone, arXiv 2212.04488, sec. 3.1."""
    unet = TinyUNet(4 + draw.seed)
    parameters = dict(unet.named_parameters())

    def where(*parts: str, within: str = "attn2") -> set[str]:
        return {n for n in parameters if within in n and any(f".{p}." in n for p in parts)}

    right = where("to_k", "to_v")
    slips = {
        "Everything learns: switch all others off, `requires_grad_(False)`.": set(parameters),
        "Nothing learns: switch K and V of `attn2` on, `requires_grad_(True)`.": set(),
        "attn1 is self-attention: words come in by attn2.": where("to_k", "to_v", within="attn"),
        "That is attn1, self-attention: take attn2.": where("to_k", "to_v", within="attn1"),
        "The queries learn, too, the picture's side: leave to_q out.": right | where("to_q"),
        "The whole cross-attention learns: K and V alone.": right | where("to_q", "to_out"),
        "Only the keys learn: the values, too.": where("to_k"),
    }

    def count(answer: Answer) -> object:
        given = ask(answer, unet)
        learns = {name for name, p in parameters.items() if p.requires_grad}
        for says, wrong in slips.items():
            if learns == wrong:
                raise Mistake(says)
        for name in parameters:
            if (name in learns) != (name in right):
                raise Mistake(f"{name} should {'learn' if name in right else 'stay'}.")
        return given

    sizes = {name: p.numel() for name, p in parameters.items()}
    counts = {
        "That is how many tensors are trained: count their numbers, `.numel()`.": len(right),
        "That counts the whole UNet: what is trained alone.": sum(sizes.values()),
    }
    return Trial(count, sum(sizes[name] for name in right), counts)


@check
def check_given_back(draw: Draw) -> Trial:
    """Check given_back(lost, gained): sum gained / sum lost over subjects, (S,) -> (), no unit."""
    lost = torch.tensor([0.5, 0.4, 0.02, 0.6]).double() + 0.05 * draw.uniform(0, 1, 4)
    gained = torch.tensor([0.3, 0.1, -0.03, 0.5]).double() + 0.05 * draw.uniform(0, 1, 4)
    right = gained.sum() / lost.sum()
    slips = {
        "You averaged ratios: who lost little decides. Divide the sums.": (gained / lost).mean(),
        "Upside down: gained over lost.": 1 / right,
        "That is what was gained on average; relative to what was lost, please.": gained.mean(),
        "One number for the method is asked for.": gained / lost,
        "That is the share that is still lost.": 1 - right,
    }
    return Trial((lost, gained), right, slips)


class TinyPlugUNet(nn.Module):
    """A noise network called as a diffusers UNet, (B, C, h, w), (B,), (B, L, D) -> `.sample`."""

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


def plug_batch(
    seed: int = 0, along: Tensor | None = None
) -> tuple[TinyPlugUNet, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return a tiny UNet and (x_t, t, model_pred, class_embeds, uncond_embeds) to try a plug on.

    along: (B,), where the subjects lie between "nothing", 0, and "dog", 1.
    """
    along = torch.linspace(-0.5, 2, 5) if along is None else along
    generator, unet, size = torch.Generator().manual_seed(seed), TinyPlugUNet(seed), len(along)
    dog, nothing = (2 * torch.randn(1, 4, 3, generator=generator) for _ in range(2))
    x_t = torch.randn(size, 2, 4, 4, generator=generator)
    t = torch.randint(100, (size,), generator=generator)
    prediction = unet(x_t, t, nothing + along[:, None, None] * (dog - nothing)).sample
    return unet, (x_t, t, prediction, dog.expand(size, -1, -1), nothing.expand(size, -1, -1))


@check
def check_plug(draw: Draw) -> list[Trial]:
    """Check plug(unet, x_t, t, model_pred, class_embeds, uncond_embeds), eq. 7-9; (B,)."""
    from sude_lab.sude import SudeRegularizer  # here: it imports diffusers, which is slow

    along = torch.tensor([-0.4, 0.1, 0.5, 0.8, 1.3, 1.9])
    unet, (x_t, t, prediction, dog, nothing) = plug_batch(draw.seed, along)
    call = (unet, x_t, t, prediction, dog, nothing)
    terms, swapped = (
        SudeRegularizer(
            unet, short_schedule(), one[:1], two[:1], prior="current", weighting="simple"
        ).terms(x_t, t, prediction)
        for one, two in ((dog, nothing), (nothing, dog))
    )
    slips = {
        "The gate is missing: eq. 9 gives 0 where L_sude <= tau.": terms.loss,
        "The gate is the wrong way round: open is L_sude > tau.": terms.loss * ~terms.gate,
        "Class and no prompt are exchanged.": swapped.gated,
        "You summed the squares: take their mean, as the loop's MSE does.": 32 * terms.gated,
        "That is the hinge: leave - tau out.": (terms.loss - terms.threshold) * terms.gate,
        "That is the gate: times L_sude.": terms.gate,
        "One number a sample is asked for; the loop averages them.": terms.gated.mean(),
    }

    def slope(values: Tensor) -> Tensor:
        weights = list(unet.parameters())
        slopes = torch.autograd.grad(
            values.mean(), weights, retain_graph=True, materialize_grads=True
        )
        return nn.utils.parameters_to_vector(slopes)

    def pushed(answer: Answer) -> Tensor:
        given = ask(answer, *call)
        if not isinstance(given, Tensor) or not given.requires_grad:
            raise Mistake("The values are right, but no gradient reaches the UNet by `model_pred`.")
        return slope(given)

    hint = "A gradient flows through the predictions for class or no prompt: `torch.no_grad()`."
    gradients = Trial(pushed, slope(terms.gated), {}, tolerance=1e-5, hint=hint)
    return [Trial(call, terms.gated, slips), gradients]
