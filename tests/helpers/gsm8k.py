"""Answers and problems for the task gsm8k."""

import torch
from torch import Tensor

from unmask.tasks.gsm8k import Gsm8k


def said(task: Gsm8k, *texts: str) -> Tensor:
    """Canvases of the first held-out question, answered so and padded with the end token."""
    canvas = task.validation(1)
    prompt = canvas.x0[canvas.prompt_mask].tolist()
    result = torch.full((len(texts), task.config.length), task.tokens.eos_id)
    for row, text in zip(result, texts, strict=True):
        ids = prompt + task.vocabulary.encode(text)
        row[: len(ids)] = torch.tensor(ids)
    return result


PROBLEMS = [
    {"question": "How many?", "answer": "Two and two.\n#### 1,004"},
    {"question": "How much? ", "answer": 2.5},
    {"question": "And now?", "answer": "7", "other": None},
]
