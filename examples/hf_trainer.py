"""PUMA in a Hugging Face `Trainer`: its model, optimizer, schedule, logging and devices, our masks.

    pip install -e '.[hf]'
    python examples/hf_trainer.py       (seconds on a CPU)

The trainer's own data loader reads ahead, but a pool hands out its next batch only after it has seen what the model
made of the last one. So the loader merely counts, and `compute_loss` asks the pool. (This is for one process without
gradient accumulation; with several, give each its `RowShard`. To resume, save `pool.state_dict()` in a callback.)
"""

import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

import unmask

MASK, LENGTH, BATCH = 10, 12, 64
PRIMES = torch.tensor([7919, 104729, 1299709, 15485863, 32452843, 49979687])


class Palindromes:
    """A stream: the n-th example of an endless sequence. The left half is given, and determines the right one."""

    def __getitem__(self, number: torch.Tensor) -> unmask.CleanBatch:
        left = number.unsqueeze(1) * PRIMES // 64 % MASK
        x0 = torch.cat([left, left.flip(1)], dim=1)
        return unmask.CleanBatch(x0=x0, prompt_mask=(torch.arange(LENGTH) < LENGTH // 2).expand_as(x0))


class PumaTrainer(Trainer):  # type: ignore[misc]
    """Trains a masked language model, `input_ids` (B, L) -> `logits` (B, L, V), on a pool's batches."""

    def __init__(self, *arguments: Any, pool: unmask.PumaPool, stream: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pool, self.stream = pool, stream

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        batch = self.pool.next_batch(self.stream)
        logits = batch.gather(model(input_ids=batch.xt).logits)
        logits[:, self.pool.mask_id] = -torch.inf
        asked = self.pool.requirements.confidence
        stats = unmask.TokenStats.from_logits(logits, batch.gather(batch.x0), confidence=asked)
        self.pool.observe(batch, stats)
        return (stats.nll * batch.weight).sum() / len(batch.x0)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=MASK + 1, max_position_embeddings=LENGTH, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, initializer_range=96**-0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=400, learning_rate=2e-3, logging_steps=50, save_strategy="no",
        report_to="none", disable_tqdm=True, per_device_train_batch_size=BATCH,
    )  # fmt: skip
    trainer = PumaTrainer(
        model,
        arguments,
        train_dataset=[{"labels": 0}] * BATCH,  # to be counted, not looked at
        pool=unmask.PumaPool(
            mask_id=MASK, shard=unmask.RowShard.whole(BATCH), num_stages=6, threshold=0.9, device=arguments.device
        ),
        stream=Palindromes(),
    )
    trainer.train()
    model.eval()
    fresh = Palindromes()[torch.arange(10**6, 10**6 + 500)].to(model.device)
    decoder = unmask.Decoder(
        unmask.predictor_from_logits(lambda xt: model(input_ids=xt).logits, mask_id=MASK), mask_id=MASK
    )
    is_right = decoder.decode(fresh.masked(MASK)).tokens == fresh.x0
    print(f"{is_right.all(dim=1).float().mean():.1%} of 500 rows filled in as they should be")
