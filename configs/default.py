"""Every key a run has, with its default. The other configs start from here and override.

    python -m jaxdp.train --config=configs/default.py --workdir=DIR --config.data.path=FILE.txt

A key is set in a config file, or on the command line as --config.KEY=VALUE.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default config, complete but for data.path."""
    c = ConfigDict()

    # The run.

    c.seed = 0  # Decides initial parameters, data order, dropout; same seed, same run.
    c.num_train_steps = 1000  # Optimizer steps.
    c.num_epochs = 0  # Instead: as many steps as this many passes over the training split take.
    c.global_batch_size = 16  # Sequences per optimizer step, over all devices of all processes.
    c.grad_accum_steps = 1  # Micro-batches a device works through per optimizer step.
    # Parts of a sequence whose logits are made one after another, and again in the backward pass:
    # more of them save memory where the vocabulary is large. Divides seq_len.
    c.loss_chunks = 1
    c.seq_len = 256  # Tokens per sequence; also the longest context of the model.
    c.log_every = 10  # Steps between lines of metrics.jsonl.
    c.eval_every = 250  # Steps between evaluations; there is always one at the end.
    c.eval_max_batches = 0  # Batches per evaluation; 0: the whole validation split.
    # More texts to evaluate on, by name: "code=text:GLOB,wiki=tfds:NAME". Files as a whole, of TFDS
    # data.eval_split; logged as eval/NAME/loss. Early stopping and the best checkpoint ignore them.
    c.eval_sets = ""
    # Without progress for so many seconds, or 10 times the longest it took before, a process ends
    # with an error, for a scheduler to start it again. 10 times that to compile or save; 0: never.
    c.hang_seconds = 300

    # The data.
    c.data = ConfigDict()
    # "tfds:NAME[/CONFIG][:VERSION]", text files "text:GLOB" or "FILE.txt", JSON lines "jsonl:GLOB".
    # Several of these, by weight: "0.7*tfds:NAME+0.3*text:GLOB".
    c.data.path = ""
    c.data.data_dir = ""  # Where TFDS keeps its data; "": ~/tensorflow_datasets.
    c.data.text_key = "text"  # The TFDS feature, or the key of JSON lines, that holds the text.
    # Likewise what comes before the text, seen but not learned ("padded" only); "": nothing.
    c.data.prompt_key = ""
    c.data.train_split = "train"  # TFDS split to train on; slices such as "train[:99%]" too.
    c.data.eval_split = "validation"  # TFDS split to evaluate on.
    # Files: this much of the text (of the JSON lines), from its end, is validation.
    c.data.eval_fraction = 0.1
    # How documents become sequences: "stream": one text, in which a token may see the documents
    # before its own; "documents": each by itself, several to a sequence; "padded": one to a
    # sequence, of a longer one its beginning, as for fine-tuning.
    c.data.packing = "stream"
    c.data.cache_dir = ""  # Where tokenised text is kept; "": ~/.cache/jaxdp/tokens.

    # "char", "byte", "train:bpe:VOCAB_SIZE" (trained on the training split), "hf:NAME" from the
    # Hugging Face hub, "hf:FOLDER", or the path of a tokenizer.json or of a SentencePiece .model.
    c.tokenizer = "byte"

    # The weights that a new run starts from: "hf:FOLDER" of a model that transformers has saved, or
    # "hf:NAME" from the Hugging Face hub; of the model's shape (docs/huggingface.md). "": random.
    c.init_from = ""

    # The model.

    c.objective = "causal"  # "causal": predict the next token; "masked": BERT's cloze task.
    c.model = ConfigDict()
    c.model.num_layers = 4  # Blocks of attention and MLP.
    c.model.num_heads = 4  # Attention heads; divides embed_dim.
    c.model.num_kv_heads = 0  # Key/value heads (grouped-query attention); 0: num_heads.
    c.model.embed_dim = 128  # Model width D.
    c.model.mlp_dim = 0  # Hidden width of the feed-forward layer; 0: 4 * embed_dim.
    c.model.positions = "learned"  # "learned" or "rotary".
    c.model.rotary_base = 10_000.0  # Of the wavelengths of rotary positions ("rope_theta").
    c.model.norm = "layernorm"  # "layernorm" or "rmsnorm".
    # "pre": of what goes into attention and MLP, as in GPT-2. "post": of the sums, as in BERT.
    c.model.norm_position = "pre"
    c.model.norm_epsilon = 1e-5  # Added to the variance.
    # "gelu" (tanh approximation, as in GPT-2), "gelu_exact" (BERT) or "swiglu" (Llama).
    c.model.activation = "gelu"
    c.model.head_transform = False  # BERT's dense layer, GELU and norm before the output.
    c.model.tied_head = True  # The output layer shares the embedding's weights.
    c.model.bias = False  # Biases in linear layers and layer norms.
    c.model.dropout = 0.0  # On embeddings and on each residual branch.
    c.model.dtype = "float32"  # Computation: "float32" or "bfloat16". Parameters are float32.
    # Recompute activations in the backward pass: less memory, more time. (On CPUs with JAX 0.10 it
    # saves memory only together with scan_layers.)
    c.model.remat = False
    c.model.scan_layers = False  # One compiled layer, looped: compiles faster, runs slower.
    c.model.vocab_multiple = 1  # Pad the vocabulary to a multiple of this (128 suits GPUs).

    # The optimizer.
    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # "adamw", "lion", "sgd", "muon" (AdamW for what is no matrix).
    c.optimizer.learning_rate = 1e-3  # The highest of the schedule.
    c.optimizer.schedule = "cosine"  # After warm-up: "cosine", "linear", "wsd", "constant".
    c.optimizer.warmup_steps = 100  # Linear from 0 to learning_rate.
    c.optimizer.final_fraction = 0.1  # Last learning rate / highest ("constant" ignores it).
    c.optimizer.decay_fraction = 0.2  # "wsd": the share of all steps spent decaying at the end.
    c.optimizer.weight_decay = 0.1  # Decoupled; on matrices, not on biases or norm scales.
    c.optimizer.b1 = 0.9  # Momentum of every optimizer ("sgd" and "muon" use Nesterov's).
    c.optimizer.b2 = 0.99  # Second-moment decay ("adamw", "lion", "muon"'s AdamW part).
    c.optimizer.clip_norm = 1.0  # Global gradient norm is clipped to this; 0: never.

    # How the devices' replicas of the model agree (docs/synchronisation.md; jaxdp/sync/methods.py).
    c.sync = ConfigDict()
    # "gradient_mean": average gradients in every step. "sharded": the same, but each device holds
    # and updates its slice of the optimizer's state (ZeRO-1). "fixed_order": the same to the bit on
    # 1, 2, 4, 8 ... devices. "parameter_mean": every device trains alone, parameters and moments
    # are averaged every few steps. "diloco": likewise, and the mean change is an outer gradient.
    c.sync.method = "gradient_mean"
    c.sync.dtype = "float32"  # To send gradients in: "float32", or "bfloat16" (half the bytes).
    c.sync.every = 10  # "parameter_mean", "diloco": steps from one synchronisation to the next.
    c.sync.after = 0  # "parameter_mean": average gradients for so many steps first.
    c.sync.outer_learning_rate = 0.7  # "diloco": of the outer Nesterov steps.
    c.sync.outer_momentum = 0.9  # "diloco": likewise.
    c.sync.virtual_replicas = 8  # "fixed_order": parts of the batch, a power of two; sets the bits.
    c.sync.check_every = 100  # Steps between comparisons of all devices' states; 0: never.

    # Exponential moving average (EMA) of the parameters (jaxdp/step/ema.py), with which the run
    # then evaluates, samples and chooses its best checkpoint, as generate and evaluate do.
    c.ema = ConfigDict()
    c.ema.decay = 0.0  # What stays of it in a step, such as 0.999; 0: no average.

    # When a run stops learning. An update whose loss or gradient isn't finite is always skipped.
    c.divergence = ConfigDict()
    # Skipped updates in a row, after which the run goes back to the last good checkpoint and leaves
    # out the data since then.
    c.divergence.max_bad_steps = 10
    # Likewise after a loss so many robust deviations above the median of 100; 0: never. 8 is rare.
    c.divergence.spike_threshold = 0.0
    c.divergence.max_rollbacks = 3  # Then the run ends, with what it knows of the cause.

    # Early stopping: the run ends, as finished, when the validation loss no longer improves.
    c.stop = ConfigDict()
    c.stop.patience = 0  # Evaluations in a row without improvement that end it; 0: never.
    c.stop.min_delta = 0.0  # What counts as improvement: a loss lower by this, nats per token.

    # Checkpoints.
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # Steps between checkpoints; there is always one at the end.
    c.checkpoint.keep_last = 2  # The newest ones kept (the best by validation loss stays too).
    c.checkpoint.keep_every = 0  # Also keep those at multiples of this many steps; 0: none.

    # The sample of text shown at the end of a run, and in TensorBoard (causal models).
    c.sample = ConfigDict()
    c.sample.at_eval = False  # Also at each evaluation, in TensorBoard.
    c.sample.prompt = "\n"  # What the sample goes on from.
    c.sample.num_tokens = 200  # 0: no sample.

    # A record of some steps by JAX's profiler, in WORKDIR/profile (docs/seeing.md).
    c.profile = ConfigDict()
    c.profile.start_step = 10  # Steps done before; those up to a resumed run's start are past.
    c.profile.num_steps = 0  # Steps to record; 0: none.

    c.wandb_project = ""  # Also log to this Weights & Biases project (pip install 'jaxdp[wandb]').
    return c
