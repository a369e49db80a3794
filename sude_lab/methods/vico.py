"""ViCo (arXiv 2306.00971): the model stays as it is; a word and attention to the picture are new.

`subject_mask` finds the subject in an attention map, `attention_loss` keeps that map honest,
`image_block` is trained, `ImageAttention` joins it to a pipeline, and `ViCo` is the method.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sude_lab.backbone import Backbone, Condition, send
from sude_lab.errors import UserError
from sude_lab.methods.base import Method

REFERENCES = "references"
ATTENTION_WEIGHT = 5e-4
"""Weight of `attention_loss`, the paper's."""
PROMPTS_KEPT = 4096
_CALL = "_image_attention_call"


def otsu_threshold(values: Tensor) -> Tensor:
    """Return the threshold that parts numbers into two groups whose means differ most.

    T = argmax_T w_0 w_1 (mu_0 - mu_1)^2, Otsu 1979, w and mu being the share and the mean of the
    values <= T and of those > T. Every split is tried, none is lost in the bins of a histogram.

    Args: values: (B, N), N > 0. Returns (B,), the largest value of the lower group.
    """
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"Values must be (B, N) with N > 0, got {tuple(values.shape)}.")
    if (number := values.shape[1]) == 1:
        return values[:, 0]
    x, _ = values.sort(dim=1)
    # T moves with the values: take them from 0 to 1, where no square is lost to rounding.
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y - y[:, :1]
    y = y / y[:, -1:].clamp(min=torch.finfo(y.dtype).tiny)
    low = torch.arange(1, number, device=x.device)
    high = number - low
    low_sum = y.cumsum(dim=1)[:, :-1]
    high_sum = y.sum(dim=1, keepdim=True) - low_sum
    between = low * high * (high_sum / high - low_sum / low).square()
    between = between.masked_fill(x[:, 1:] == x[:, :-1], -1.0)  # equal values stay together
    return x.gather(1, between.argmax(dim=1, keepdim=True)).squeeze(1)


def subject_mask(attention: Tensor) -> Tensor:
    """Return where the subject is: the positions whose attention to S* is above Otsu's threshold.

    Args: attention: (B, N). Returns bool (B, N); where no position stands out, all of them.
    """
    mask = attention > otsu_threshold(attention).unsqueeze(1)
    return mask | ~mask.any(dim=1, keepdim=True)


def attention_loss(subject: Tensor, end: Tensor) -> Tensor:
    """Ask S* to look where the end of the text looks, which sums up the prompt: at the subject.

    mean_i (A_i / max A - E_i / max E)^2, arXiv 2306.00971, the attention regularisation: A is a
    reference's attention map to S*, E the one to the end-of-text token, which is detached here.

    Args: subject, end: (B, N), probabilities. Returns (B,), no unit.
    """
    end = (end / end.amax(dim=1, keepdim=True)).detach()
    return (subject / subject.amax(dim=1, keepdim=True) - end).square().mean(dim=1)


def token_attention(attn: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """Return what a cross-attention layer of diffusers gives to every token.

    softmax(Q K^T / sqrt(d)) of each head, then the mean over the heads.

    Args: hidden: (B, N, D), as the layer gets it; context: (B, L, C). Returns (B, N, L).
    """
    query = attn.head_to_batch_dim(attn.to_q(hidden))
    key = attn.head_to_batch_dim(attn.to_k(context))
    scores = attn.get_attention_scores(query, key)
    return scores.unflatten(0, (-1, attn.heads)).float().mean(dim=1)


@dataclass(frozen=True)
class Maps:
    """What one layer's text attention says of the references: (B, N) each, N positions."""

    subject: Tensor
    """Attention to S* (the mean of its places, where the prompt has several)."""
    end: Tensor
    """Attention to the first end-of-text token."""


def decoder_layers(unet: nn.Module) -> dict[str, Any]:
    """Return every second transformer block of the up path by name: the 2nd, 4th, ... of its way.

    Stable Diffusion 1 and 2 have 9, so 4 are chosen; of 2, the second; of 1, that one.
    """
    from diffusers.models.attention import BasicTransformerBlock

    layers = [
        (name, module)
        for name, module in unet.named_modules()
        if name.startswith("up_blocks.") and isinstance(module, BasicTransformerBlock)
        if module.attn2 is not None
    ]
    if not layers:
        none = "ViCo needs transformer blocks in the UNet's up path, and this model has none"
        raise UserError(f"{none}: choose another --method.")
    return dict(layers[1::2] or layers)


def image_block(host: Any) -> Any:
    """Return an image cross-attention block for a transformer block of the UNet, not yet trained.

    It starts as a copy of its host, the cross-attention (and its norm) as one of the host's
    self-attention, which looks for like places in the same features. The three layers that write
    the result start at zero: at step 0 the block changes nothing. (The authors' code starts from
    random weights, which disturb the model until they are trained.)
    """
    block = copy.deepcopy(host)
    block.attn2, block.norm2 = copy.deepcopy(host.attn1), copy.deepcopy(host.norm1)
    for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        for p in last.parameters():
            nn.init.zeros_(p)
    return block


@dataclass(frozen=True)
class _Prompt:
    """Where the subjects' words are in a prompt: places by subject, the first named one first."""

    places: dict[int, list[int]]
    end: int


@dataclass
class _Call:
    """A call of the UNet: of `size` rows, those in `rows`, (R,), have references below them."""

    size: int
    rows: Tensor
    words: Tensor
    """Weights that average over the places of S*, (R, L)."""
    ends: Tensor
    """The same for the end-of-text token, one-hot, (R, L)."""
    seen: Maps | None = None
    """From a layer's text attention to the end of that layer."""


class ImageAttention(nn.Module):
    """Image cross-attention in a pipeline, by hooks: its UNet keeps its weights and their names.

    A row of the UNet's batch whose prompt names a subject gets a second row: the subject's clean
    latent, with the same t and prompt. After every chosen layer the image block lets the noisy row
    attend to its reference, masked to the subject; at the end the reference rows are dropped. Rows
    whose prompt names no subject pass as in the plain model.

    Tuning knows its rows (`recording`). Drawing does not: a hook on the text encoder keeps, for
    every prompt with a subject's word, a digest of the hidden states and the word's places; the
    UNet's rows are looked up by their bits, for which the CPU waits. So it works in any call of the
    pipeline, but not for embeddings that this text encoder did not return as they are (mixed or
    weighted prompts, `clip_skip`): such rows pass as in the plain model. While S* has learned
    nothing, it and the word it started from make the same hidden states: the prompt that was read
    last counts.

    A copy of the pipeline (`copy.deepcopy`) has image attention of its own; `save_pretrained`
    writes the plain model.

    Args: token_ids: the ids of each subject's words, in the order of `references`, (K, C, h, w).
    """

    references: Tensor

    def __init__(self, backbone: Backbone, token_ids: list[list[int]], references: Tensor) -> None:
        super().__init__()
        hosts = decoder_layers(backbone.unet)
        self.names = list(hosts)
        self.blocks = nn.ModuleList(image_block(host) for host in hosts.values())
        self.register_buffer(REFERENCES, references.to(backbone.device))
        self.subject_of = {i: k for k, ids in enumerate(token_ids) for i in ids}
        self.end_id = backbone.tokenizer.eos_token_id
        self._on = True
        self._named: dict[int, tuple[int, _Prompt]] | None = None
        self._record: list[Maps] | None = None
        self._prompts: dict[bytes, _Prompt] = {}
        # Bound methods, no closures: copies of the pipeline then call the copy of this object.
        for number, host in enumerate(hosts.values()):
            host.attn2.register_forward_pre_hook(self._look, with_kwargs=True)
            host.register_forward_hook(partial(self._attend, number), with_kwargs=True)
        backbone.unet.register_forward_pre_hook(self._add_references, with_kwargs=True)
        backbone.unet.register_forward_hook(self._drop_references, with_kwargs=True)
        backbone.text_encoder.register_forward_hook(self._read, with_kwargs=True)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the blocks' weights, by the names of the layers they belong to."""
        named = zip(self.names, self.blocks, strict=True)
        return {f"{name}.{own}": p for name, block in named for own, p in block.named_parameters()}

    @contextmanager
    def off(self) -> Iterator[None]:
        """For a moment let the plain model answer every prompt, and remember none."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    @contextmanager
    def recording(self, condition: Condition, which: Tensor) -> Iterator[list[Maps]]:
        """Use the references of subjects `which`, (B,), and fill a list with the layers' maps.

        Raises:
            ValueError: a row's prompt does not name its subject.
        """
        lines = [[]] * len(condition) if condition.ids is None else condition.ids.tolist()
        named = {}
        for row, (ids, subject) in enumerate(zip(lines, which.tolist(), strict=True)):
            named[row] = subject, (prompt := self._prompt(ids))
            if subject not in prompt.places:
                why = f"does not name subject {subject}, or was not encoded by this backbone"
                raise ValueError(f"The prompt of sample {row} {why}.")
        self._named, self._record = named, []
        try:
            yield self._record
        finally:
            # Before the backward pass: what gradient checkpointing computes anew is not recorded.
            self._named, self._record = None, None

    def _prompt(self, ids: list[int]) -> _Prompt:
        """Return where the subjects' words are among the tokens of a prompt."""
        places: dict[int, list[int]] = {}
        for place, index in enumerate(ids):
            if index in self.subject_of:
                places.setdefault(self.subject_of[index], []).append(place)
        return _Prompt(places, ids.index(self.end_id) if self.end_id in ids else len(ids) - 1)

    # Hooks, in the order in which they are called -------------------------------------------------

    def _read(self, encoder: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Keep what the text encoder made of every prompt with a subject's word."""
        if not self._on:
            return
        ids = args[0] if args else kwargs["input_ids"]
        for key, line in zip(_digests(output[0]), ids.tolist(), strict=True):
            self._prompts.pop(key, None)  # what was read last comes last, or is no more
            if (prompt := self._prompt(line)).places:
                self._prompts[key] = prompt
        for key in list(islice(self._prompts, max(0, len(self._prompts) - PROMPTS_KEPT))):
            del self._prompts[key]

    def _add_references(self, unet: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Put the references below the batch."""
        if not self._on:
            return None
        inputs = inspect.signature(unet.forward).bind(*args, **kwargs).arguments
        sample, t, hidden = (inputs[n] for n in ("sample", "timestep", "encoder_hidden_states"))
        named = self._named
        if named is None:  # drawing: the first subject that a prompt names
            prompts = enumerate(map(self._prompts.get, _digests(hidden)))
            named = {k: (next(iter(p.places)), p) for k, p in prompts if p}
        if not named:
            return None
        if self.references.device != sample.device:  # no part of the UNet, so not moved with it
            self.to(sample.device)
        places = torch.zeros(2, len(named), hidden.shape[1])
        for k, (subject, prompt) in enumerate(named.values()):
            places[0, k, prompt.places[subject]] = 1 / len(prompt.places[subject])
            places[1, k, prompt.end] = 1
        words, ends = send(places, sample.device)
        rows = send(torch.tensor(list(named)), sample.device)
        which = send(torch.tensor([subject for subject, _ in named.values()]), sample.device)
        references = self.references[which].to(sample.dtype)
        size = sample.shape[2:]
        if references.shape[2:] != size:  # drawn at another size than tuned at
            references = F.interpolate(references, size, mode="bilinear", antialias=True)
        inputs["sample"] = torch.cat([sample, references])
        if isinstance(t, Tensor) and t.numel() > 1:  # one t for all needs no more rows
            inputs["timestep"] = torch.cat([t, t[rows]])
        # The layers learn of this call by the tensor that they are given anyway: gradient
        # checkpointing gives them the same one again, long after other calls were made.
        inputs["encoder_hidden_states"] = torch.cat([hidden, hidden[rows]])
        setattr(inputs["encoder_hidden_states"], _CALL, _Call(len(sample), rows, words, ends))
        return (), inputs

    def _look(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what a layer's text attention makes of the references; compute no loss here."""
        context = kwargs.get("encoder_hidden_states")
        call = getattr(context, _CALL, None)
        if call is None or context is None:
            return
        attention = token_attention(attn, args[0][call.size :], context[call.size :])
        subject, end = ((attention * of[:, None]).sum(dim=-1) for of in (call.words, call.ends))
        call.seen = Maps(subject, end)

    def _attend(self, number: int, host: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
        """Let the noisy rows attend to their references, after layer `number`."""
        # By place where gradient checkpointing calls the layer, by name elsewhere.
        context = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        call = getattr(context, _CALL, None)
        if call is None:
            return None
        maps, call.seen = call.seen, None
        if self._record is not None:
            self._record.append(maps)
        noisy, reference = output[: call.size], output[call.size :]
        hidden = ~subject_mask(maps.subject.detach())
        bias = torch.zeros_like(maps.subject, dtype=output.dtype)
        bias = bias.masked_fill(hidden, torch.finfo(output.dtype).min)
        block: Any = self.blocks[number]
        attended = block(
            noisy[call.rows],
            # Normalised as the noisy rows are: keys and values as a self-attention makes them.
            encoder_hidden_states=block.norm2(reference),
            encoder_attention_mask=bias.unsqueeze(1),
        )
        noisy = noisy.index_copy(0, call.rows, attended.to(noisy.dtype))
        return torch.cat([noisy, reference])

    def _drop_references(self, unet: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the batch's own rows of the UNet's answer."""
        call = getattr(kwargs.get("encoder_hidden_states"), _CALL, None)
        if call is None:
            return None
        if isinstance(output, tuple):
            return (output[0][: call.size], *output[1:])
        return type(output)(sample=output.sample[: call.size])


def _digests(hidden: Tensor) -> list[bytes]:
    """Return a short name for every row of hidden states, (B, L, D): the same bits, the same."""
    rows = hidden.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


class ViCo(Method):
    """Train S* and image cross-attention blocks in every second layer of the UNet's up path.

    `prompt`: "photo of a {S*}". The UNet and the text encoder are frozen. The reference of a
    subject is its picture's latent, kept beside the blocks in `vico.safetensors` and resampled for
    other sizes. A prompt that names several subjects uses the reference of the first one.

    SuDe's classifier reads "photo of a dog" and "", which do not name the subject: the priors
    `current` and `pretrained` are the same.

    Of the authors' code: steps, rates and weights. Ours are Otsu's threshold over every split (they
    try nine), blocks that start as no change, and a loss for every sample.
    """

    name: ClassVar[str] = "vico"
    template: ClassVar[str] = "photo of a {S*}"
    defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-5,
        "token_learning_rate": 5e-3,
        "weight_sude": 1.5,
        "max_train_steps": 400,
        "train_batch_size": 1,
    }

    def prepare(self) -> None:
        """Add the blocks; open them and the subjects' words."""
        check_one_text_encoder(self.backbone)
        shape = (len(self.subjects), self.backbone.unet.config.in_channels, 1, 1)
        ids = self.tokens["text_encoder"].groups
        self.images = ImageAttention(self.backbone, ids, torch.zeros(shape))
        self.maps: list[Maps] = []
        """What the layers of the last `predict` saw."""
        for name, p in self.images.weights().items():
            p.requires_grad = True
            self.parameters[f"image.{name}"] = p
        self.train_tokens()

    def start(self, latents: list[Tensor]) -> None:
        """Take the subjects' clean latents as references, never mirrored."""
        references = torch.cat([latent[:1] for latent in latents])
        self.images.references = references.to(self.backbone.device)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, which: Tensor) -> Tensor:
        """Return the subject's model output with image attention; the prompts must name `which`."""
        with self.images.recording(condition, which) as self.maps:
            return self.backbone.predict(x_t, t, condition)

    def subject_conditions(self) -> Condition:
        """Return the subjects' conditions: `predict` knows them by their tokens, not their bits."""
        with self.images.off():
            return super().subject_conditions()

    def own_loss(self) -> Tensor | None:
        """Return 5e-4 times `attention_loss`, summed over layers, of the last `predict`, (B,)."""
        if not self.maps:
            return None
        losses = [attention_loss(maps.subject, maps.end) for maps in self.maps]
        return ATTENTION_WEIGHT * torch.stack(losses).sum(dim=0)

    @torch.no_grad()
    def predict_pretrained(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the model output without image attention, which is the UNet before tuning."""
        return self.predict_current(x_t, t, condition)

    def predict_current(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return what the model says of a prompt without the subject: the UNet never changes."""
        with self.images.off():
            return self.backbone.predict(x_t, t, condition)


def check_one_text_encoder(backbone: Backbone) -> None:
    """Raise a UserError where the model has several text encoders."""
    if backbone.is_xl:
        made = "ViCo is made for models with one text encoder and not for SDXL"
        raise UserError(f"{made}: choose Stable Diffusion 1 or 2, or another --method.")
