"""PUMA in a loop of your own: any module from tokens to logits, without our trainer, configuration or model.

python examples/any_model.py        (seconds on a CPU)
"""

import torch
from torch import nn

import unmask

MASK, LENGTH, BATCH = 11, 10, 64


class Progressions:
    """A stream: the n-th example of an endless sequence. Any object with `[numbers]` will do.

    Arithmetic progressions modulo 11, of which two neighbouring cells are given: those determine the rest.
    """

    def __getitem__(self, number: torch.Tensor) -> unmask.CleanBatch:
        start, stride, first = (u.unsqueeze(1) for u in (number * 7919 % 11, 1 + number * 104729 % 10, number * 31))
        cell = torch.arange(LENGTH)
        return unmask.CleanBatch(x0=(start + stride * cell) % 11, prompt_mask=(cell - first) % LENGTH < 2)


class Mixer(nn.Module):
    """Tokens (B, L) -> logits (B, L, V): an MLP over the whole row, as good as any other module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(MASK + 1, 24)
        self.mlp = nn.Sequential(nn.Linear(24 * LENGTH, 512), nn.GELU(), nn.Linear(512, LENGTH * (MASK + 1)))

    def forward(self, xt: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embedding(xt).flatten(1)).view(len(xt), LENGTH, MASK + 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model
    model, stream = Mixer(), Progressions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pool = unmask.PumaPool(mask_id=MASK, shard=unmask.RowShard.whole(BATCH), num_stages=6, threshold=0.9)
    for step in range(1, 501):
        batch = pool.next_batch(stream)
        logits = batch.gather(model(batch.xt))  # at the masked positions
        logits[:, MASK] = -torch.inf  # nothing is ever the mask
        stats = unmask.TokenStats.from_logits(logits, batch.gather(batch.x0), confidence=pool.requirements.confidence)
        loss = (stats.nll * batch.weight).sum() / BATCH
        loss.backward()
        pool.observe(batch, stats)  # reveals, retires, refills
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            fresh = stream[torch.arange(10**6, 10**6 + 500)]
            decoder = unmask.Decoder(unmask.predictor_from_logits(model, mask_id=MASK), mask_id=MASK)
            is_right = decoder.decode(fresh.masked(MASK)).tokens == fresh.x0
            print(f"step {step}: {is_right.all(dim=1).float().mean():.1%} of 500 rows filled in as they should be")
