"""The lines of the guide's page on other people's scripts do in loops of their shape what they say.

The oracle is eq. 7-9 of a copy of the UNet, made before training. Small models of the real classes.
"""

import copy
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from real_configs import REAL, build, shrink
from torch import Tensor, nn

from sude_lab.backbone import Backbone, Condition
from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError
from sude_lab.sude import SudeRegularizer, sude_terms

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "notebooks" / "guide" / "training-scripts.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^<!-- lines: (\w+) -->\n```python\n(.+?)^```$", PAGE, re.S | re.M))
LORA = LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
SCRIPTS = {
    "dreambooth": "noisy_model_input",
    "dreambooth_lora": "noisy_model_input",
    "textual_inversion": "noisy_latents",
    "custom_diffusion": "noisy_latents",
    "text_to_image_lora": "noisy_latents",
}


def add(name: str, names: dict[str, Any]) -> None:
    exec(compile(LINES[name], name, "exec"), names)


@pytest.fixture
def listening(tiny: Backbone) -> Backbone:
    """The tiny model hardly listens to words as it is made: SuDe would drown in rounding."""
    with torch.no_grad():
        for name, p in tiny.unet.named_parameters():
            if name.endswith("attn2.to_out.0.weight"):
                p.mul_(30)
    return tiny


def custom_processors(unet: Any) -> None:
    """Custom Diffusion's, as its script sets them: keys and values of the words, of the layers."""
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        of_words = "attn2" in name
        about = (layer.to_q.in_features, layer.to_k.in_features if of_words else None)
        processor = CustomDiffusionAttnProcessor2_0(of_words, False, *about)
        if of_words:
            for part in ("to_k", "to_v"):
                weights = getattr(layer, part).state_dict()
                getattr(processor, f"{part}_custom_diffusion").load_state_dict(weights)
        processors[name] = processor
    unet.set_attn_processor(processors)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(before: Any, names: dict[str, Any], x_t: Tensor, conditions: Any) -> Tensor:
    """0.4 times the mean of eq. 9, asked of the model of before for the subject's half alone.

    Of eq. 7 where the lines' own object does not truncate: its gates would hide the rest.
    """
    truncated = "sude" not in names or names["sude"].truncated
    n = len(names["model_pred"])
    x_t, t = x_t[:n], names["timesteps"][:n]
    with torch.no_grad():
        outputs = [before(x_t, t, **c.map(lambda x: x.to(x_t)).expand(n).arguments).sample.float()
                   for c in conditions]  # fmt: skip
    schedule = Schedule.from_scheduler(names["noise_scheduler"])
    output = names["model_pred"].float()
    terms = sude_terms(output, *outputs, x_t, t, schedule, truncated=truncated)
    return 0.4 * terms.gated.mean()


@pytest.mark.parametrize(
    ("script", "prior_preservation", "pre_compute", "train_text_encoder", "dtype"),
    [
        ("dreambooth", False, False, False, torch.float32),
        ("dreambooth", True, True, False, torch.float32),
        ("dreambooth", True, False, True, torch.float32),
        ("dreambooth_lora", False, False, False, torch.float32),
        ("dreambooth_lora", True, True, False, torch.bfloat16),
        ("dreambooth_lora", False, False, True, torch.float32),
        ("textual_inversion", False, False, False, torch.float32),
        ("textual_inversion", False, False, False, torch.bfloat16),
        ("custom_diffusion", False, False, False, torch.float32),
        ("custom_diffusion", True, False, False, torch.float32),
        ("text_to_image_lora", False, False, False, torch.float32),
        ("text_to_image_lora", False, False, False, torch.bfloat16),
    ],
)
def test_the_lines_for_diffusers_scripts(
    script: str,
    prior_preservation: bool,
    pre_compute: bool,
    train_text_encoder: bool,
    dtype: torch.dtype,
    listening: Backbone,
) -> None:
    unet, text_encoder = listening.unet, listening.text_encoder
    before = copy.deepcopy(unet)
    conditions = [listening.encode_prompts([p]).map(Tensor.detach) for p in ("photo of a dog", "")]
    index = listening.add_token("<new>", "cat")[0]
    AcceleratorState._reset_state(True)
    mixed = "bf16" if dtype == torch.bfloat16 else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=mixed)
    names: dict[str, Any] = {
        "torch": torch,
        "unet": unet,
        "text_encoder": text_encoder,
        "tokenizer": listening.tokenizer,
        "noise_scheduler": DDPMScheduler.from_config(listening.pipeline.scheduler.config),
    }
    if script == "dreambooth":
        unet.requires_grad_(True)
    elif script == "custom_diffusion":
        custom_processors(unet)
    elif script != "textual_inversion":
        unet.to(dtype)
        unet.add_adapter(LORA)
        cast_training_params(unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    if train_text_encoder or script == "textual_inversion":
        table = text_encoder.get_input_embeddings().weight
        trained += list(text_encoder.parameters()) if train_text_encoder else [table]
    for p in trained:
        p.requires_grad_(True)
    add("embed", names)
    if pre_compute:
        pre_computed = names["embed"]("photo of a <new>")
        text_encoder = names["text_encoder"] = names["tokenizer"] = None
    rate = 1e-4 if script == "dreambooth" else 1e-2
    optimizer = accelerator.prepare(torch.optim.AdamW(trained, lr=rate))
    if script in ("textual_inversion", "custom_diffusion"):
        unet.to(dtype)  # these scripts do not prepare it
    else:
        names["unet"] = accelerator.prepare(unet)
    add("make", names)
    names["sude"].truncated = False
    for step in range(3):
        size = 4 * (1 + prior_preservation)
        latents, eps = noise(size, 4, 8, 8, seed=step), noise(size, 4, 8, 8, seed=step + 9)
        timesteps = torch.randint(1000, (size,), generator=torch.Generator().manual_seed(step))
        noisy = names["noise_scheduler"].add_noise(latents, eps, timesteps).to(dtype)
        if text_encoder is None:
            hidden = pre_computed
        else:
            ids = listening.tokenize(["photo of a <new>"])
            hidden = text_encoder(ids)[0].to(dtype)
        model_pred = names["unet"](noisy, timesteps, hidden.expand(size, -1, -1)).sample
        target = eps
        names |= {SCRIPTS[script]: noisy, "timesteps": timesteps}
        plain = torch.zeros(())
        if prior_preservation:
            model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
            target, target_prior = torch.chunk(target, 2, dim=0)
            plain = F.mse_loss(model_pred_prior.float(), target_prior.float())
        plain = plain + F.mse_loss(model_pred.float(), target.float())
        names |= {"model_pred": model_pred, "loss": plain}
        add(SCRIPTS[script], names)
        added = names["loss"] - plain
        right = expected(before.to(dtype), names, noisy, conditions)
        torch.testing.assert_close(added, right, rtol=2e-2 if mixed == "bf16" else 1e-3, atol=1e-6)
        moved = torch.autograd.grad(added, trained, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in moved)
        optimizer.zero_grad()
        accelerator.backward(names["loss"])
        optimizer.step()
    if script == "textual_inversion":
        assert table.grad is not None and table.grad[index].any()
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipeline = build(shrink(REAL["sdxl"])[0], tmp_path_factory.mktemp("xl"))
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False).eval()
    return pipeline


def encode_prompt(encoders: list[Any], tokenizers: list[Any], prompt: str) -> tuple[Tensor, Tensor]:
    """As the script's: hidden states before the last layer side by side, and the last pooled."""
    hidden = []
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        length = tokenizer.model_max_length
        ids = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
        output = encoder(ids.input_ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, dim=-1), output[0]


@pytest.mark.parametrize("prior_preservation", [False, True])
def test_the_lines_for_sdxl(prior_preservation: bool, xl: Any) -> None:
    unet = copy.deepcopy(xl.unet)
    scheduler = DDPMScheduler.from_config(xl.scheduler.config)

    def compute_time_ids(original_size: Any, crops_coords_top_left: Any) -> Tensor:
        return torch.tensor([[*original_size, *crops_coords_top_left, 64, 64]]).float()

    names: dict[str, Any] = {
        "torch": torch,
        "args": SimpleNamespace(resolution=64),
        "compute_time_ids": compute_time_ids,
        "encode_prompt": encode_prompt,
        "text_encoder_one": xl.text_encoder,
        "text_encoder_two": xl.text_encoder_2,
        "tokenizer_one": xl.tokenizer,
        "tokenizer_two": xl.tokenizer_2,
        "noise_scheduler": scheduler,
        "unet": unet,
    }
    unet.add_adapter(LORA)
    add("embed_xl", names)
    add("make", names)
    names["sude"].truncated = False
    hidden, pooled = encode_prompt(
        [xl.text_encoder, xl.text_encoder_2], [xl.tokenizer, xl.tokenizer_2], "photo of a dog"
    )
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    dog = Condition(hidden, pooled, sizes)
    null = Condition(torch.zeros_like(hidden), torch.zeros_like(pooled), sizes)
    size = 2 * (1 + prior_preservation)
    timesteps = torch.arange(size) * 200 + 100
    noisy = noise(size, 4, 8, 8, seed=1)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:  # as after some steps
                p.add_(0.05)
    model_pred = unet(noisy, timesteps, **dog.expand(size).arguments).sample[: size // 1]
    if prior_preservation:
        model_pred, _ = torch.chunk(model_pred, 2, dim=0)
    names |= {"noisy_model_input": noisy, "timesteps": timesteps}
    names |= {"model_pred": model_pred, "loss": torch.zeros(())}
    add("noisy_model_input", names)
    right = expected(xl.unet, names, noisy, (dog, null))
    torch.testing.assert_close(names["loss"], right, rtol=1e-3, atol=1e-7)
    assert names["loss"].requires_grad


# --- other trainers: what their classes have of ours, in small -----------------------------------


class Adapter(nn.Module):
    """A LoRA in the place of a layer's `forward`, as these trainers' networks are."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.multiplier, self.is_active = 1.0, True
        self.up = nn.Parameter(0.3 * noise(16, 4, seed=5))
        layer = unet.conv_in
        self.frozen = layer.forward
        layer.forward = self.answer
        self.layer = [layer]

    def answer(self, x: Tensor) -> Tensor:
        more = torch.einsum("oc,bchw->bohw", self.up, x.to(self.up))
        return self.frozen(x) + self.multiplier * self.is_active * more

    def set_multiplier(self, value: float) -> None:
        self.multiplier = value

    def remove_hook_from_module(self) -> None:
        self.layer[0].forward = self.frozen

    def hook_to_module(self) -> None:
        self.layer[0].forward = self.answer


@pytest.fixture
def batch(listening: Backbone) -> dict[str, Any]:
    """What all have: a noisy batch, the subject's prompt, and the answers that SuDe must get."""
    before = copy.deepcopy(listening.unet)
    x_t, t = noise(3, 4, 8, 8, seed=2), torch.tensor([50, 400, 900])
    with torch.no_grad():
        conditions = [
            listening.encode_prompts([p]) for p in ("photo of a dog", "", "photo of a cat")
        ]
    scheduler = DDPMScheduler.from_config(listening.pipeline.scheduler.config)
    return {
        "before": before,
        "x_t": x_t,
        "t": t,
        "conditions": conditions[:2],
        "subject": conditions[2].hidden.expand(3, -1, -1),
        "scheduler": scheduler,
    }


def gated(batch: dict[str, Any], output: Tensor) -> Tensor:
    about = {"model_pred": output, "timesteps": batch["t"], "noise_scheduler": batch["scheduler"]}
    return expected(batch["before"], about, batch["x_t"], batch["conditions"])


def modules(monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    """Put modules of these names where the lines import them from."""
    for name, content in contents.items():
        path = name.replace("__", ".")
        for end in (i for i, ch in enumerate(path + ".") if ch == "."):
            if path[:end] not in sys.modules:
                monkeypatch.setitem(sys.modules, path[:end], ModuleType(path[:end]))
        for key, value in content.items():
            monkeypatch.setattr(sys.modules[path], key, value, raising=False)


def test_the_lines_for_sd_scripts(
    listening: Backbone, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NetworkTrainer:
        def post_process_network(self, *about: Any) -> None:
            pass

        def call_unet(
            self, args: Any, accelerator: Any, unet: Any, x: Any, t: Any, conds: Any, *rest: Any
        ) -> Tensor:
            return unet(x, t, conds[0]).sample

        def post_process_loss(self, loss: Tensor, *about: Any) -> Tensor:
            return loss

    class Words:
        def tokenize(self, text: str) -> list[Tensor]:
            return [listening.tokenize([text])]

        def encode_tokens(
            self, words: Any, models: list[Any], tokens: list[Tensor]
        ) -> list[Tensor]:
            return [models[0](tokens[0])[0]]

    found = SimpleNamespace(get_strategy=Words)
    strategies = SimpleNamespace(TokenizeStrategy=found, TextEncodingStrategy=found)
    modules(
        monkeypatch,
        library={"strategy_base": strategies},
        train_network={"NetworkTrainer": NetworkTrainer},
    )
    names: dict[str, Any] = {}
    add("sd_scripts", names)
    trainer, unet = names["SudeTrainer"](), listening.unet
    network = Adapter(unet)
    trainer.post_process_network(None, None, network, [listening.text_encoder], unet)
    about = (None, None, unet, batch["x_t"], batch["t"], [batch["subject"]], None, torch.float32)
    output = trainer.call_unet(*about)
    with torch.no_grad():  # what the trainer asks for reasons of its own
        trainer.call_unet(*about)
    loss = trainer.post_process_loss(torch.zeros(3), None, batch["t"], batch["scheduler"])
    torch.testing.assert_close(loss.mean(), gated(batch, output))
    (gradient,) = torch.autograd.grad(loss.mean(), network.up)
    assert gradient.any() and network.multiplier == 1.0
    with torch.no_grad():
        trainer.call_unet(*about)
        plain = trainer.post_process_loss(torch.zeros(3), None, batch["t"], batch["scheduler"])
    assert not plain.any()


@pytest.mark.parametrize("regularisation", [False, True])
def test_the_lines_for_ai_toolkit(
    regularisation: bool,
    listening: Backbone,
    batch: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Embeds:
        def __init__(self, text: str) -> None:
            self.text = text

        def expand_to_batch(self, number: int) -> Tensor:
            return listening.encode_prompts([self.text]).expand(number).hidden

    class SDTrainer:
        def __init__(self) -> None:
            self.network = Adapter(listening.unet)
            self.sd = SimpleNamespace(noise_scheduler=batch["scheduler"])

        def hook_before_train_loop(self) -> None:
            pass

        def encode_static_prompt(self, prompt: list[str]) -> Embeds:
            return Embeds(prompt[0])

        def predict_noise(self, x: Tensor, t: Tensor, conditional_embeds: Any) -> Tensor:
            return listening.unet(x, t, conditional_embeds).sample

        def calculate_loss(self, *about: Any, **more: Any) -> Tensor:
            return torch.zeros(())

    modules(monkeypatch, extensions_built_in__sd_trainer__SDTrainer={"SDTrainer": SDTrainer})
    names: dict[str, Any] = {}
    add("ai_toolkit", names)
    trainer = names["SudeTrainer"]()
    trainer.hook_before_train_loop()
    output = trainer.predict_noise(batch["x_t"], batch["t"], batch["subject"])
    row = SimpleNamespace(get_is_reg_list=lambda: [False, regularisation])
    loss = trainer.calculate_loss(output, None, batch["x_t"], batch["t"].float(), row)
    if regularisation:
        assert not loss
        return
    torch.testing.assert_close(loss, gated(batch, output))
    (gradient,) = torch.autograd.grad(loss, trainer.network.up)
    assert gradient.any() and trainer.network.is_active


def test_the_lines_for_onetrainer(listening: Backbone, batch: dict[str, Any]) -> None:
    adapter = Adapter(listening.unet)

    class Base:
        train_device = torch.device("cpu")

        @contextmanager
        def prior_model(self, model: Any, config: Any) -> Iterator[None]:
            adapter.remove_hook_from_module()
            try:
                yield
            finally:
                adapter.hook_to_module()

        def predict(self, model: Any, batch: Any, *about: Any, **more: Any) -> dict[str, Any]:
            output = model.unet(batch["x_t"], batch["t"], batch["subject"]).sample
            return {"predicted": output, "timestep": batch["t"]}

        def calculate_loss(self, *about: Any) -> Tensor:
            return torch.zeros(())

    model = SimpleNamespace(
        unet=listening.unet,
        noise_scheduler=batch["scheduler"],
        autocast_context=nullcontext(),
        encode_text=lambda train_device, text: listening.encode_prompts([text]).hidden,
    )
    names: dict[str, Any] = {"Base": Base, "torch": torch}
    imports = "from sude_lab import diffusion, sude_terms\n"
    body = textwrap.indent(LINES["onetrainer"], "    ")
    exec(compile(f"{imports}class Setup(Base):\n{body}", "onetrainer", "exec"), names)
    setup = names["Setup"]()
    data = setup.predict(model, batch, None, None, deterministic=False)
    loss = setup.calculate_loss(model, batch, data, None)
    torch.testing.assert_close(loss, gated(batch, data["predicted"]))
    (gradient,) = torch.autograd.grad(loss, adapter.up)
    assert gradient.any()
    with torch.no_grad():
        data = setup.predict(model, batch, None, None)
    assert not setup.calculate_loss(model, batch, data, None)


# --- what goes wrong there -----------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence(listening: Backbone, xl: Any) -> None:
    unet, schedule = listening.unet, listening.schedule
    dog, null = (listening.encode_prompts([p]) for p in ("photo of a dog", ""))
    sude = SudeRegularizer(unet, schedule, dog, null)
    x_t, t, output = noise(4, 4, 8, 8, seed=0), torch.arange(4), noise(2, 4, 8, 8, seed=1)
    with pytest.raises(UserError, match=r"prior preservation hand over .* x_t\[:n\] and t\[:n\]"):
        sude(x_t, t, output)
    with pytest.raises(
        UserError, match="t the shape \\(4,\\), the class 1 and the model's output 2"
    ):
        sude(x_t[:2], t, output)
    with pytest.raises(UserError, match="the class 3"):
        sude(x_t[:2], t[:2], output, dog.expand(3))
    with pytest.raises(UserError, match="leave --do_edm_style_training out"):
        sude(x_t[:2], t[:2].float(), output)
    for embeds in ((dog.hidden, dog.hidden[:, 0]), dog.hidden[0], None):
        with pytest.raises(UserError, match="A prompt is a Tensor"):
            SudeRegularizer(unet, schedule, embeds, null)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="first two are zeros for no prompt"):
        SudeRegularizer(xl.unet, schedule, dog, null)


@pytest.mark.parametrize("train", ["unet", "nothing"])
def test_it_may_be_made_before_the_models_are_cast(train: str, listening: Backbone) -> None:
    unet = listening.unet.requires_grad_(train == "unet")
    dog, null = (listening.encode_prompts([p]) for p in ("photo of a dog", ""))
    sude = SudeRegularizer(unet, listening.schedule, dog, null)
    x_t, t, output = noise(2, 4, 8, 8, seed=0), torch.tensor([9, 700]), noise(2, 4, 8, 8, seed=1)
    before = sude(x_t, t, output)
    unet.to(torch.bfloat16)
    if train == "unet":
        with torch.no_grad():
            for p in unet.parameters():
                p.add_(0.1)
    after = sude(x_t.bfloat16(), t, output)
    torch.testing.assert_close(after, before, rtol=0.1, atol=1e-2)
