"""Tools that train: a compiled model gives the losses of the eager one, step by step, and its blocks are fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass.nn import QuantizedLinear
from tests.integrations.tiny import llama, logits, tokens

pytestmark = pytest.mark.integration

STEPS = 3
# Of float32 losses after some steps: rounding, which an optimizer carries on.
CLOSE = 1e-5


class Block(nn.Module):
    """A feed-forward block as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(24, 96), nn.Linear(96, 24), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return y


Step = Callable[[], Tensor]


def losses(step: Step) -> list[float]:
    return [step().item() for _ in range(STEPS)]


def compared(eager: Step, compiled: Step) -> tuple[fuse_pass.Report, str]:
    """What was fused, and how the losses agree."""
    expected = losses(eager)
    with fuse_pass.collect() as report:
        found = losses(compiled)
    assert expected[0] != expected[-1]  # it trains
    difference = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    assert difference < CLOSE
    return report, f"losses within {difference:.0e} of eager's"


def shown(report: fuse_pass.Report) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(report.counts().items()))


def test_accelerate(works_with: Callable[..., None]) -> None:
    accelerate = pytest.importorskip("accelerate")
    x, target = torch.randn(16, 24), torch.randn(16, 24)

    def stepper(model: nn.Module) -> Step:
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            accelerator.backward(loss)
            optimizer.step()
            return loss

        return step

    model = Block()
    eager = stepper(copy.deepcopy(model))
    model.compile(backend="fuse_pass")
    report, agreement = compared(eager, stepper(model))
    assert report.counts()["dense_act_dense"] == 1
    works_with("accelerate", "`Accelerator.prepare` of a model that was compiled in place", shown(report), agreement)


def test_trainer_takes_what_can_be_trained(tmp_path: Path, works_with: Callable[..., None]) -> None:
    """Of models that were loaded quantised: fake quantisation trains in full, packed weights only beside adapters."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    from fuse_pass.integrations.transformers import FusePassConfig

    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    options = {"max_steps": 2, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), disable_tqdm=True, learning_rate=0.01, **options)
    rows = [{"input_ids": row, "labels": row} for row in tokens()]

    def loaded(config: FusePassConfig) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)

    model = loaded(FusePassConfig(convert="fp8_e4m3"))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[1] < found[0]
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(loaded(FusePassConfig("int8")), arguments, train_dataset=rows)
    layers = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    ran = "Trainer, of a model that was loaded in fp8"
    works_with("transformers", ran, f"{layers} layers in fp8", "not compared; the loss falls")


def test_fabric(works_with: Callable[..., None]) -> None:
    lightning = pytest.importorskip("lightning")
    x, target = torch.randn(16, 24), torch.randn(16, 24)

    def stepper(model: nn.Module) -> Step:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(wrapped(x), target)
            fabric.backward(loss)
            optimizer.step()
            return loss

        return step

    model = Block()
    eager = stepper(copy.deepcopy(model))
    report, agreement = compared(eager, stepper(torch.compile(model, backend="fuse_pass")))
    assert report.counts()["dense_act_dense"] == 1
    works_with("lightning", "`Fabric.setup` of a compiled model", shown(report), agreement)


def test_lora_is_trained_and_merged(works_with: Callable[..., None]) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    def stepper(model: Any) -> Step:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            return loss

        return step

    base = llama(num_hidden_layers=1)
    eager, model = adapted(copy.deepcopy(base)), adapted(copy.deepcopy(base))
    model.compile(backend="fuse_pass")
    report, agreement = compared(stepper(eager), stepper(model))
    assert report.counts()["dropout_norm"] >= 2
    works_with("peft", "LoRA beside q, up and down projections, trained", shown(report), agreement)

    merged = model.merge_and_unload()
    expected = logits(merged)
    merged.compile(backend=fuse_pass.FuseBackend(prepack=True))
    with fuse_pass.collect() as report:
        difference = (logits(merged) - expected).abs().max().item()
    assert report.counts()["gated_dense"] == 1
    assert difference < CLOSE
    works_with("peft", "LoRA merged, then prepack", shown(report), f"logits within {difference:.0e} of eager's")


def test_repeated_blocks_of_diffusers(works_with: Callable[..., None]) -> None:
    """One compilation for the blocks of a kind: the second runs the code of the first."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 0, "axes_dims_rope": (4, 4, 8)}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20}
    model = diffusers.FluxTransformer2DModel(**sizes, **heads).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "pooled_projections": torch.randn(1, 20),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }

    def run() -> Tensor:
        with torch.no_grad():
            y: Tensor = model(**inputs).sample
            return y

    expected = run()
    model.compile_repeated_blocks(backend="fuse_pass")
    with fuse_pass.collect() as report:
        difference = (run() - expected).abs().max().item()
    assert report.counts()["dense_act_dense"] == 2  # of the image and of the text, in the first block
    assert difference < CLOSE
    agreement = f"samples within {difference:.0e} of eager's"
    works_with("diffusers", "`compile_repeated_blocks` of a Flux transformer", shown(report), agreement)
