"""Text generation, compiled: a model that is packed while it is loaded, and a static cache.

`generate` compiles by itself on GPUs alone, and by its own settings; on a CPU a static cache compiles nothing. So the
model is compiled in place. The cache's size does not change, so that all steps after the prompt run one graph.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fuse_pass
from fuse_pass.integrations.transformers import FusePassConfig

torch.manual_seed(0)
sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1}
float_model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None))
prompt = torch.arange(8).view(1, 8)

with tempfile.TemporaryDirectory() as folder:
    float_model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FusePassConfig("int8_weight_only"))

model.generation_config.cache_implementation = "static"
model.generation_config.max_new_tokens = 8
model.generation_config.do_sample = False
eager = model.generate(prompt)

fuse_pass.compile(model, inplace=True)  # this line is all
with fuse_pass.collect() as report:
    compiled = model.generate(prompt)
assert torch.equal(compiled, eager)
print(f"generate: fused {dict(report.counts())}; the same {model.generation_config.max_new_tokens} tokens as eager")
assert report.graphs == 2  # the prompt, and one token
assert report.counts()["dropout_norm"] >= 4  # RMSNorm with the residual before it; packed products stay what they are
