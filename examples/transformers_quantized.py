"""Packs a model, saves it with `save_pretrained`, and loads it again: the same numbers from a seventh of the file.

Whoever loads it imports `fuse_pass.integrations.transformers` once before.
"""

import pathlib
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fuse_pass
from fuse_pass.integrations.transformers import FusePassConfig

torch.manual_seed(0)
sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).eval()
tokens = torch.arange(32).view(2, 16)


def size(folder: pathlib.Path) -> float:
    return (folder / "model.safetensors").stat().st_size / 2**20


with tempfile.TemporaryDirectory() as name, torch.no_grad():
    folder = pathlib.Path(name)
    model.save_pretrained(folder / "float")

    packed = fuse_pass.pack(model, "int4_weight_only")
    packed.save_pretrained(folder / "packed")
    again = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert torch.equal(again(tokens).logits, packed(tokens).logits)
    sizes = f"{size(folder / 'float'):.1f} MiB as float, {size(folder / 'packed'):.1f} MiB packed"
    print(f"saved and loaded: packed to 4 bits, {sizes}; the same bits")

    # Or while it is loaded. The output layer stays in floating point, as with transformers' own quantizers.
    wish = FusePassConfig("int4_weight_only")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=wish)
    expected = fuse_pass.pack(model, "int4_weight_only", exclude="lm_head")
    assert type(loaded.lm_head) is torch.nn.Linear
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    layers = sum(isinstance(module, fuse_pass.nn.PackedLinear) for module in loaded.modules())
    print(f"while it was loaded: packed {layers} layers; as fuse_pass.pack does, bit for bit")
