"""Every key of a run, with its default. The other configs start from these and change some.

    python -m jaxdp.train --config=configs/default.py --workdir=DIR --config.data.path=FILE.txt

Set keys in a config file, or on the command line as --config.KEY=VALUE.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default config, complete but for data.path."""
    c = ConfigDict()

    # The run.

    c.seed = 0  # Decides initial parameters, data order and dropout; same seed, same run.
    c.num_train_steps = 1000  # Optimizer steps.
    c.num_epochs = 0  # Passes over the training split, instead of num_train_steps; 0: not used.
    c.global_batch_size = 16  # Sequences per optimizer step, over all devices of all processes.
    c.grad_accum_steps = 1  # Micro-batches per device and optimizer step.
    # Split each sequence into this many chunks, and compute the logits and their gradient of one at
    # a time. Saves memory if the vocabulary is large, for a few percent of speed. Divides seq_len.
    c.loss_chunks = 1
    c.seq_len = 256  # Tokens per sequence; also the longest context of the model.
    c.log_every = 10  # Steps between lines of metrics.jsonl.
    c.eval_every = 250  # Steps between evaluations; there is always one at the end.
    # Batches per evaluation; 0: the entire validation split. After a change, the best checkpoint is
    # chosen anew.
    c.eval_max_batches = 0
    # More data to evaluate on, "NAME=PATH,NAME=PATH": all text of files, data.eval_split of TFDS.
    # Logged as eval/NAME/loss. Early stopping and the choice of the best checkpoint ignore it.
    c.eval_sets = ""
    # A process exits with an error, so that a scheduler can restart it, after this many seconds
    # without progress, or 10 times the longest that the same activity has taken if that is more.
    # Compiling, saving, and an activity's first time may take 10 times hang_seconds. 0: never.
    c.hang_seconds = 300

    # The data.
    c.data = ConfigDict()
    # Files, whose names say what they hold: .txt or .md, .jsonl, .json, .csv, .parquet, each also
    # compressed (.gz, .zst, .bz2, .xz). Give a file, a folder, a glob, or several with commas
    # between them; "text:GLOB", "jsonl:GLOB" ... say what is in files with other names. Or a TFDS
    # dataset "tfds:NAME[/CONFIG][:VERSION]", or "hf:NAME[:CONFIG]" from the Hugging Face hub (also
    # a folder). Several of these are mixed by weight: "0.7*tfds:NAME+0.3*text:GLOB".
    c.data.path = ""
    c.data.data_dir = ""  # Where TFDS keeps its data; "": ~/tensorflow_datasets.
    # The key of JSON, the column of CSV and Parquet, or the TFDS feature that holds the text.
    c.data.text_key = "text"
    # That which holds a prompt to put before the text. With "padded" packing the model sees it, but
    # does not learn to predict it. "": no prompts.
    c.data.prompt_key = ""
    # The key of a list of {"role": "user", "content": TEXT}: data are chats, and only what the
    # role "assistant" says is learnt. "": no chats.
    c.data.messages_key = ""
    # A file, in Jinja, that says how to write chats; "": the tokenizer's own.
    c.data.chat_template = ""
    c.data.skip_missing = False  # Skip, and count, records without these keys. False: refuse them.
    # What stands between the documents of a text file, such as "<|endoftext|>"; a line break on
    # either side of it belongs to it. "": a file is one document.
    c.data.separator = ""
    # Split to train on, of "tfds:" (or a slice such as "train[:99%]") and "hf:".
    c.data.train_split = "train"
    # Split to evaluate on. With "hf:", "": eval_fraction of the documents of train_split.
    c.data.eval_split = "validation"
    # Fraction of the text in text files, or of the records in others, taken from the end for
    # validation.
    c.data.eval_fraction = 0.1
    # The token that begins each document and prompt. "auto": that which the tokenizer itself puts
    # first, as Llama's and BERT's do; or the name of a token; "": none.
    c.data.bos = "auto"
    # The token that ends each document. "auto": the tokenizer's own (docs/data.md); or its name.
    c.data.eos = "auto"
    # Whether the name of a special token in a text, such as "<|endoftext|>", is that token rather
    # than plain text: in training, evaluation and prompts.
    c.data.special_tokens = False
    # How documents are packed into sequences. "stream": concatenated; a token may attend to earlier
    # documents. "documents": several per sequence; a token attends to its own document only.
    # "padded": one per sequence, truncated if it is too long, as for fine-tuning.
    c.data.packing = "stream"
    # Where tokenised text is kept; "": $XDG_CACHE_HOME/jaxdp/tokens, or ~/.cache/jaxdp/tokens.
    c.data.cache_dir = ""

    # "char", "byte", "train:bpe:VOCAB_SIZE" (trained on the training split), "hf:NAME" from the
    # Hugging Face hub, "hf:FOLDER", or the path of a tokenizer.json or of a SentencePiece .model.
    c.tokenizer = "byte"

    # The weights that a new run starts from: "hf:FOLDER", saved by transformers, or "hf:NAME" from
    # the Hugging Face hub; they must fit the model (docs/huggingface.md). "": random weights.
    c.init_from = ""

    # The model.

    c.objective = "causal"  # "causal": predict the next token; "masked": BERT's masked LM.
    c.model = ConfigDict()
    c.model.num_layers = 4  # Blocks of attention and MLP.
    c.model.num_heads = 4  # Attention heads; a divisor of embed_dim, unless head_dim is given.
    c.model.num_kv_heads = 0  # Key/value heads (grouped-query attention); 0: num_heads.
    c.model.head_dim = 0  # Width of a head; 0: embed_dim / num_heads.
    c.model.embed_dim = 128  # Model width D.
    c.model.mlp_dim = 0  # Hidden width of the feed-forward layer; 0: 4 * embed_dim.
    c.model.positions = "learned"  # "learned" or "rotary".
    c.model.rotary_base = 10_000.0  # Base of the wavelengths of rotary positions ("rope_theta").
    # Llama 3.1's scaling of rotary positions ("rope_scaling" of type "llama3"): wavelengths longer
    # than rotary_context / rotary_low become so many times as long. 1: no scaling.
    c.model.rotary_factor = 1.0
    c.model.rotary_low = 1.0  # See rotary_factor ("low_freq_factor").
    # Wavelengths shorter than rotary_context / rotary_high stay, if others are scaled; those in
    # between are interpolated ("high_freq_factor").
    c.model.rotary_high = 4.0
    # Context before the scaling, in tokens ("original_max_position_embeddings").
    c.model.rotary_context = 8192
    # Each layer whose number, from 1, is a multiple of this has no positions (SmolLM3: 4); 0: none.
    c.model.rotary_skip = 0
    c.model.norm = "layernorm"  # "layernorm" or "rmsnorm".
    # "pre": normalise the input of attention and MLP, as in GPT-2. "post": normalise the residual
    # sums after them, as in BERT.
    c.model.norm_position = "pre"
    c.model.norm_epsilon = 1e-5  # Added to the variance in norms.
    # "gelu" (tanh approximation, as in GPT-2), "gelu_exact" (BERT), "swiglu" (Llama) or "relu2"
    # (ReLU squared, as in Primer, So et al. 2021).
    c.model.activation = "gelu"
    c.model.head_transform = False  # Add BERT's dense layer, GELU and norm before the output layer.
    c.model.tied_head = True  # The output layer shares the embedding's weights.
    c.model.qk_norm = False  # Normalise queries and keys over the width of each head (Qwen3).
    # Matrices that write to the residual stream start as zeros: each block as the identity (ReZero,
    # Bachlechner et al. 2020; muP, Yang et al. 2022). False: with GPT-2's small random numbers.
    c.model.zero_init = False
    # Logits become cap * tanh(logits / cap) (Gemma 2, 2024, caps at 30); 0: no cap.
    c.model.logit_cap = 0.0
    # Each block's input is a * x + b * (the first block's input), with numbers a and b that are
    # learnt (modded-nanogpt, 2024).
    c.model.embed_residual = False
    # In each layer, a table of one vector per token is added to the values of attention
    # (modded-nanogpt, 2024, after Zhou et al. 2024).
    c.model.value_embeddings = False
    # Each MLP also sees so many tokens before its own: their channels are multiplied by learnt
    # factors and added to its input (as with 3 in the Canon layers, Allen-Zhu 2025). 0: none.
    c.model.mlp_lookback = 0
    # A token attends to this many tokens, itself and those before it (Mistral 7B, 2023); 0: to all.
    c.model.window = 0
    # Each layer whose number, from 1, is a multiple of this has no window (Gemma 2: 2); 0: none.
    c.model.window_skip = 0
    c.model.bias = False  # Add biases to linear layers and layer norms.
    c.model.qkv_bias = False  # Add biases to query, key and value only (Qwen2).
    c.model.dropout = 0.0  # Dropout rate, on embeddings and on each residual branch.
    # Dropout rate of attention's weights (GPT-2). Where it isn't 0, fused kernels can't be used.
    c.model.attention_dropout = 0.0
    c.model.dtype = "float32"  # "float32" or "bfloat16" for computation; parameters are float32.
    # Recompute activations in the backward pass: less memory, more time. (On CPUs with JAX 0.10 it
    # saves memory only together with scan_layers.)
    c.model.remat = False
    c.model.scan_layers = False  # Loop over one compiled layer: compiles faster, runs slower.
    c.model.vocab_multiple = 1  # Pad the vocabulary to a multiple of this (128 suits GPUs).

    # The optimizer.
    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # "adamw", "lion", "sgd", or "muon" (AdamW for non-matrices).
    c.optimizer.learning_rate = 1e-3  # The peak of the schedule.
    c.optimizer.schedule = "cosine"  # After warm-up: "cosine", "linear", "wsd" or "constant".
    # Steps of linear warm-up: step t, from 0, has (t + 1) / (warmup_steps + 1) of learning_rate.
    c.optimizer.warmup_steps = 100
    c.optimizer.final_fraction = 0.1  # Last learning rate / peak (not used by "constant").
    c.optimizer.decay_fraction = 0.2  # "wsd": fraction of all steps for the decay at the end.
    c.optimizer.weight_decay = 0.1  # Decoupled; for matrices, not for biases or norm scales.
    c.optimizer.b1 = 0.9  # Momentum of every optimizer (Nesterov's in "sgd" and "muon").
    c.optimizer.b2 = 0.99  # Second-moment decay ("adamw", "lion", the AdamW part of "muon").
    c.optimizer.clip_norm = 1.0  # Clip gradients to this global norm; 0: never.

    # How the replicas on the devices are synchronised (docs/synchronisation.md).
    c.sync = ConfigDict()
    # "gradient_mean": average gradients in every step. "sharded": the same, but each device keeps
    # and updates a slice of the optimizer's state (ZeRO-1). "fixed_order": bitwise the same results
    # on 1, 2, 4, 8 ... devices. "parameter_mean": each device trains alone; parameters and moments
    # are averaged every few steps. "diloco": each device trains alone; every few steps the mean
    # change of the parameters is the gradient of an outer optimizer.
    c.sync.method = "gradient_mean"
    # To send gradients, or the changes of "diloco", in: "float32"; "bfloat16", half the bytes;
    # "int8", "int4", "int2", "ternary" (-1, 0 or 1) or "int1", a quarter, an eighth, a 15th, an
    # 18th or a 28th: what rounding loses is added to the next. With the last three, better the
    # changes of "diloco" than gradients.
    c.sync.dtype = "float32"
    c.sync.every = 10  # "parameter_mean", "diloco": steps between synchronisations.
    # "parameter_mean", "diloco": groups of devices that train as one, with the mean gradient of the
    # group in each step. 0: each device is one; -1: the devices of each process; else their number.
    c.sync.islands = 0
    # "diloco": parts of the model that are synchronised in turn, each every sync.every steps.
    c.sync.fragments = 1
    c.sync.delay = 0  # "diloco": steps that a device makes while it waits for a synchronisation.
    c.sync.after = 0  # "parameter_mean": average gradients for this many steps first.
    c.sync.outer_learning_rate = 0.7  # "diloco": learning rate of the outer optimizer.
    c.sync.outer_momentum = 0.9  # "diloco": Nesterov momentum of the outer optimizer.
    # "fixed_order": parts of the global batch, a power of two. Another number rounds differently.
    c.sync.virtual_replicas = 8
    c.sync.check_every = 100  # Steps between checks that all replicas are equal; 0: never.

    # Exponential moving average (EMA) of the parameters (jaxdp/step/ema.py). If it is on, the run
    # evaluates, samples and chooses its best checkpoint with it; so do generate and evaluate.
    c.ema = ConfigDict()
    c.ema.decay = 0.0  # Weight of the old average in each step, such as 0.999; 0: no EMA.

    # What to do if the training diverges. An update with a non-finite loss or gradient is always
    # skipped.
    c.divergence = ConfigDict()
    # After this many skipped updates in a row, roll back to the last good checkpoint, and skip the
    # data since then.
    c.divergence.max_bad_steps = 10
    # Also roll back if a loss is this many robust standard deviations above the median of the last
    # 100; 0: never. Spikes above 8 are rare.
    c.divergence.spike_threshold = 0.0
    c.divergence.max_rollbacks = 3  # After this many the run ends, with a diagnosis.

    # Early stopping: the run ends, as finished, when the validation loss no longer improves. The
    # model of each evaluation is then saved, and the best one kept, whatever checkpoint.every is.
    c.stop = ConfigDict()
    c.stop.patience = 0  # Stop after this many evaluations without improvement; 0: never.
    c.stop.min_delta = 0.0  # Smallest decrease of the loss that counts, in nats per token.

    # Checkpoints.
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # Steps between checkpoints; there is always one at the end.
    c.checkpoint.keep_last = 2  # Newest ones to keep; the best by validation loss is kept, too.
    c.checkpoint.keep_every = 0  # Also keep those at multiples of this many steps; 0: none.

    # A sample of text at the end of the run, printed and in TensorBoard (causal models only).
    c.sample = ConfigDict()
    c.sample.at_eval = False  # Also sample at each evaluation, in TensorBoard.
    c.sample.prompt = "\n"  # The text that the sample continues.
    c.sample.num_tokens = 200  # Tokens in the sample; 0: no sample.

    # A trace of some steps by JAX's profiler, in WORKDIR/profile (docs/seeing.md).
    c.profile = ConfigDict()
    c.profile.start_step = 10  # Steps before the trace; a run resumed after them has none.
    c.profile.num_steps = 0  # Steps to trace; 0: none.

    # On NVIDIA GPUs, give XLA the flags in jaxdp/parallel/gpu.py, for speed. What XLA_FLAGS in the
    # environment sets goes first. False: XLA's defaults.
    c.xla_flags = True

    c.wandb_project = ""  # Also log to this Weights & Biases project (pip install 'jaxdp[wandb]').
    return c
