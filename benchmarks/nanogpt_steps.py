"""nanoGPT's training step, timed on demand; `nanogpt.py` starts this with PyTorch's Python.

Takes one JSON argument: nanogpt (the folder of its model.py), tokens (a file of uint16), compile,
batch_size, learning_rate, weight_decay, betas, grad_clip, and model (fields of GPTConfig). Prints
"ready", then for each line N on stdin the seconds that N steps took. The step is that of nanoGPT's
train.py: batch, forward, backward, clip, AdamW; the loss is read every 10 steps, its log_interval.
"""

import json
import sys

import numpy as np
import torch
import turns

settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["nanogpt"])
from model import GPT, GPTConfig  # noqa: E402

torch.manual_seed(0)
model = GPT(GPTConfig(**settings["model"]))
optimizer = model.configure_optimizers(
    settings["weight_decay"], settings["learning_rate"], tuple(settings["betas"]), "cpu"
)
if settings["compile"]:
    model = torch.compile(model)
block, batch_size = settings["model"]["block_size"], settings["batch_size"]


def batch():
    """As train.py's get_batch: it opens the file anew each time, against a leak of memmap."""
    data = np.memmap(settings["tokens"], dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block, (batch_size,))
    parts = [torch.from_numpy(data[i : i + block + 1].astype(np.int64)) for i in starts]
    window = torch.stack(parts)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def steps(count):
    """Trains `count` steps."""
    inputs, targets = batch()
    for i in range(count):
        _, loss = model(inputs, targets)
        inputs, targets = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i % 10 == 0:
            loss.item()
    return loss.item()


model.train()
steps(3)
turns.serve(steps)
