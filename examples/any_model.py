"""PUMA in a loop of your own: any module from tokens to logits, without our trainer, configuration or model.

    python examples/any_model.py        (seconds on a CPU)

The data are arithmetic progressions modulo 11, of which two cells are given: the model learns to fill in the rest.
"""

import torch
from torch import nn

import unmask

MASK, LENGTH, BATCH = 11, 10, 64


class Progressions:
    """A stream: the n-th example of an endless sequence. Any object with `[numbers]` will do."""

    def __getitem__(self, number: torch.Tensor) -> unmask.CleanBatch:
        start, stride = number * 7919 % 11, 1 + number * 104729 % 10
        x0 = (start.unsqueeze(1) + stride.unsqueeze(1) * torch.arange(LENGTH)) % 11
        first = (number * 31 % LENGTH).unsqueeze(1)
        is_given = (torch.arange(LENGTH) - first) % LENGTH < 2
        return unmask.CleanBatch(x0=x0, prompt_mask=is_given)


class Mixer(nn.Module):
    """Tokens (B, L) -> logits (B, L, V): an MLP over the whole row, as good as any other module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(MASK + 1, 24)
        self.mlp = nn.Sequential(nn.Linear(24 * LENGTH, 512), nn.GELU(), nn.Linear(512, LENGTH * (MASK + 1)))

    def forward(self, xt: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embedding(xt).flatten(1)).view(len(xt), LENGTH, MASK + 1)


torch.manual_seed(0)
torch.set_num_threads(1)  # so small a model
model, stream = Mixer(), Progressions()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
predict = unmask.predictor_from_logits(model, mask_id=MASK)
pool = unmask.PumaPool(mask_id=MASK, shard=unmask.RowShard.whole(BATCH), num_stages=6, threshold=0.9)
for step in range(500):
    batch = pool.next_batch(stream)
    logits = batch.gather(model(batch.xt))  # at the masked positions
    logits[:, MASK] = -torch.inf  # nothing is ever the mask
    stats = unmask.TokenStats.from_logits(logits, batch.gather(batch.x0))
    loss = (stats.nll * batch.weight).sum() / BATCH
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    pool.observe(batch, stats)  # reveals, retires, refills
    if step % 100 == 99:
        fresh = stream[torch.arange(10**6, 10**6 + 500)]
        decoded = unmask.Decoder(predict, mask_id=MASK).decode(fresh.masked(MASK))
        right = (decoded.tokens == fresh.x0).all(dim=1).float().mean()
        print(f"step {step + 1}: {right:.1%} of 500 rows filled in as they should be")
