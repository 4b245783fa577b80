"""Small random models of transformers, and processes that load them again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[2]


def llama(**options: object) -> LlamaForCausalLM:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    options = {"tie_word_embeddings": True, **options}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})).eval()


def bert(**options: object) -> BertForSequenceClassification:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    return BertForSequenceClassification(BertConfig(**{**sizes, **heads, **options})).eval()


def tokens() -> Tensor:
    return torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(tokens()).logits
    return result


def python(code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=check, cwd=ROOT)
