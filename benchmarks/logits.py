"""Compares logits of Hugging Face's transformers and jaxdp from the same weights, in full size.

    python benchmarks/logits.py      # float32 on a CPU; about 3 GB of memory, minutes

transformers draws the weights and saves them, and jaxdp loads them from that folder, as a user
does. The tokens are random and fill the context.
"""

import runpy
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from jaxdp.huggingface import families, load
from jaxdp.huggingface.families import FAMILIES
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = (("gpt2", 50257, "gpt2"), ("llama_135m", 49152, "llama"))
SIZES += (("bert_base", 30522, "bert"), ("bert_base", 50265, "roberta"))
PAD = 1  # The drawn tokens are larger.


def main() -> None:
    """Prints a row of a table for each family."""
    for file, vocab_size, name in SIZES:
        config = runpy.run_path(str(CONFIGS / f"{file}.py"))["get_config"]()
        config.model.vocab_multiple, config.model.dtype = 1, "float32"
        model = ModelConfig.from_config(config, vocab_size)
        architecture = getattr(transformers, FAMILIES[name].architecture)
        torch.manual_seed(0)
        values = families.to_json(model, name, PAD) | {"pad_token_id": PAD}
        theirs = architecture(architecture.config_class(**values)).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            params = load.read(f"hf:{folder}", model)
        tokens = np.random.default_rng(0).integers(PAD + 1, vocab_size, (1, model.seq_len))
        start = time.perf_counter()
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        found = np.asarray(jax.jit(Transformer(model).apply)({"params": params}, tokens))
        worst, size = np.abs(found - expected).max(), np.abs(expected).max()
        same = (found.argmax(-1) == expected.argmax(-1)).mean()
        print(
            f"| {FAMILIES[name].architecture} | {theirs.num_parameters():,} | {model.seq_len} | "
            f"{worst:.1e} | {size:.2f} | {same:.2%} |  {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
