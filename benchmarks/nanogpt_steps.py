"""nanoGPT's training step, timed on demand; `nanogpt.py` starts this with PyTorch's Python.

Takes one JSON argument: nanogpt (the folder of its model.py), tokens (a file of uint16), compile,
device ("cpu" or "cuda", where it computes in bfloat16), batch_size, learning_rate, weight_decay,
betas, grad_clip, and model (fields of GPTConfig). `turns.serve` describes what it prints. A step is
as in nanoGPT's train.py: batch, forward, backward, clip, AdamW; the loss is read every 10 steps,
its log_interval. On a GPU it uses PyTorch's flash attention, and TF32 for float32.
"""

import json
import sys

import numpy as np
import torch
import turns

settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["nanogpt"])
from model import GPT, GPTConfig  # noqa: E402

block, batch_size = settings["model"]["block_size"], settings["batch_size"]
device, cuda = settings["device"], settings["device"] == "cuda"


def batch():
    """Makes a batch as train.py does: opens the file each time, against a leak of memmap."""
    data = np.memmap(settings["tokens"], dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block, (batch_size,))
    parts = [torch.from_numpy(data[i : i + block + 1].astype(np.int64)) for i in starts]
    window = torch.stack(parts)
    halves = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return [x.pin_memory().to(device, non_blocking=True) for x in halves] if cuda else halves


def main():
    """Trains as many steps as each line of stdin says."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = GPT(GPTConfig(**settings["model"])).to(device)
    optimizer = model.configure_optimizers(
        settings["weight_decay"], settings["learning_rate"], tuple(settings["betas"]), device
    )
    if settings["compile"]:
        model = torch.compile(model)
    precision = torch.autocast(device, torch.bfloat16, enabled=cuda)

    def steps(count):
        inputs, targets = batch()
        for i in range(count):
            with precision:
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
    turns.serve(steps, torch.cuda.max_memory_allocated if cuda else int)


turns.run(main)
