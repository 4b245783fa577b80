"""Fine-tunes with transformers' Trainer, compiled by fuse_pass, and in fp8 on top.

`TrainingArguments(torch_compile_backend=…)` knows only the backends that accelerate lists, so the model is compiled in
place before the Trainer gets it: its class, its signature and what it saves stay as they are.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fuse_pass
import fuse_pass.integrations.transformers  # so that what is converted can be saved and loaded


def train(model: BertForSequenceClassification) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 96, (64, 16))
    examples = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    folder = tempfile.mkdtemp()
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1}
    arguments = TrainingArguments(
        folder, **options, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    trainer.save_model(folder)
    again = BertForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.cpu().parameters(), strict=True))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # whose random numbers are others
    loss = "single_label_classification"  # or else the first call finds that out, and the second is compiled anew
    return BertForSequenceClassification(BertConfig(**sizes, **dropout, num_attention_heads=4, problem_type=loss))


if __name__ == "__main__":
    fp8 = {torch.nn.Linear: "fp8_e4m3"}
    ways = {"Trainer": lambda model: model, "Trainer in fp8": lambda model: fuse_pass.convert(model, fp8)}
    for name, prepare in ways.items():
        eager = train(prepare(bert()))
        model = prepare(bert())
        fuse_pass.compile(model, inplace=True)  # this line is all
        with fuse_pass.collect() as report:
            compiled = train(model)
        difference = max(abs(one - other) for one, other in zip(eager, compiled, strict=True))
        shown = ", ".join(f"{loss:.5f}" for loss in compiled)
        print(f"{name}: fused {dict(report.counts())}; losses {shown}, within {difference:.0e} of eager's")
        assert report.counts()["dense_act_dense"] == 2  # the feed-forward block, and the pooler with the classifier
        assert difference < 1e-5
