"""Converts SentencePiece models (Kudo and Richardson 2018) to the `tokenizers` library."""

import itertools
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxdp.common.errors import ConfigError, shown

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # Kinds of pieces, as a model file numbers them.
UNIGRAM, BPE = 1, 2  # Kinds of models.
SPACE = "\u2581"
PROBES = (  # Texts that a converted model has to encode as the original does.
    "",
    " ",
    "Hello, world!  This is\ta test.\n",
    " 0123 4567  89 ",
    "na\u00efve caf\u00e9 \ufb01ne \uff21\u2460 \u4f60\u597d \U0001f600",
    "def f(x):\n    return x ** 2\n",
)


def load(path: Path) -> Tokenizer:
    """Converts a `.model` file and checks that the result gives the same tokens.

    Raises:
      ConfigError: the file is no SentencePiece model, the package sentencepiece is missing, or
        the model can't be converted exactly.
    """
    name = f"tokenizer={shown(str(path))}"
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConfigError(
            f"{name} needs the package sentencepiece: pip install 'jaxdp[sentencepiece]', or give "
            "a tokenizer.json"
        ) from None
    try:
        data = path.read_bytes()
        original = sentencepiece.SentencePieceProcessor(model_proto=data)
        model: Any = sentencepiece_model_pb2
        model = model.ModelProto.FromString(data)
    except Exception as error:  # Of several kinds, protobuf's among them.
        raise ConfigError(
            f"{name} can't be read ({shown(error, as_text=str)}): give one that sentencepiece wrote"
        ) from None
    try:
        tokenizer = convert(model)
        wrong = _difference(original, tokenizer)
    except Exception as error:  # The library raises bare Exceptions.
        wrong = shown(error, as_text=str)
    if wrong:
        raise ConfigError(
            f"{name} can't be converted exactly ({wrong}): give a tokenizer.json of it, or another "
            "tokenizer"
        )
    return tokenizer


def convert(model: Any) -> Tokenizer:
    """Returns a tokenizer with the pieces and ids of a SentencePiece model.

    Args:
      model: sentencepiece's ModelProto.

    Raises:
      ValueError: the model is neither unigram nor BPE.
    """
    kinds = {UNIGRAM: _unigram, BPE: _bpe}
    if model.trainer_spec.model_type not in kinds:
        raise ValueError("it is neither a unigram nor a BPE model")
    tokenizer = Tokenizer(kinds[model.trainer_spec.model_type](model))
    if steps := _normalizers(model.normalizer_spec):
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(_decoders(model))
    controls = [p.piece for p in model.pieces if p.type in (UNKNOWN, CONTROL)]
    if model.trainer_spec.model_type == UNIGRAM:
        # The name of a control or byte piece in a text is plain text. The library's Unigram would
        # take it for the piece, but it can't across a cut after the first character.
        names = [p.piece for p in model.pieces if p.type in (UNKNOWN, CONTROL, BYTE)]
        apart = "|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in names)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(apart), "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in controls])
    defined = [p.piece for p in model.pieces if p.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return tokenizer


def _unigram(model: Any) -> models.Unigram:
    pieces = [(p.piece, p.score) for p in model.pieces]
    return models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _bpe(model: Any) -> models.BPE:
    """Returns a BPE model; two pieces are merged in the order of the result's score."""
    ids = {p.piece: i for i, p in enumerate(model.pieces)}
    merges = []
    for i, piece in enumerate(model.pieces):
        if piece.type in (UNKNOWN, CONTROL):
            continue
        text = piece.piece
        parts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in parts if pair[0] in ids and pair[1] in ids]
        merges += [(-piece.score, i, ids[a], ids[b], (a, b)) for a, b in known]
    return models.BPE(
        ids,
        [pair for *_, pair in sorted(merges)],
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _normalizers(spec: Any) -> list[Any]:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _decoders(model: Any) -> list[Any]:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    every = model.normalizer_spec.remove_extra_whitespaces
    if model.normalizer_spec.add_dummy_prefix or every:
        steps.append(decoders.Strip(" ", 2**20 if every else 1, 0))
    return steps


def _difference(original: Any, tokenizer: Tokenizer) -> str:
    """Describes a text that the two encode differently, of PROBES and all pieces; "" if none."""
    tokenizer.encode_special_tokens = True
    pieces = [original.id_to_piece(i).replace(SPACE, " ") for i in range(len(original))]
    texts = [*PROBES, *pieces, *map("".join, itertools.pairwise(pieces))]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, original.encode(texts), encodings, strict=True):
        if ids != encoding.ids:
            return f"{text!r} is {ids}, not {encoding.ids}"
    return ""
