"""From a vocabulary to a Hugging Face `tokenizers.Tokenizer` that turns plain text into ids.

Control tokens are left out of its vocabulary, so that no text can become one; finding them where they are
wanted is `irkit.tokenizer.tokenizer`'s part.
"""

from operator import itemgetter

from tokenizers import Regex
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from irkit.errors import ModelFileError
from irkit.tokenizer.pre_tokenizers import PreTokenizer
from irkit.tokenizer.vocabulary import Vocabulary

# What takes the place of the unknown token's text: the space keeps it from being formed by any text, since
# SentencePiece models see ▁ for a space.
_UNKNOWN = " unknown "
# The splits of a token are tried one by one; the longest token of any released SentencePiece model is under 100.
_LONGEST_TOKEN = 512


def build(vocabulary: Vocabulary) -> HfTokenizer:
    """The tokenizer for text that holds no special token, white space already escaped.

    Raises:
        ModelFileError: If the merges name tokens that are not there.
    """
    return _sentencepiece(vocabulary) if vocabulary.pre is None else _byte_level(vocabulary)


def word_splitter(pre: PreTokenizer) -> Sequence:
    """What cuts text into the words that are encoded each by itself."""
    splits = [Split(Regex(regex), "isolated") for regex in pre.regex]
    as_bytes = [ByteLevel(add_prefix_space=False, use_regex=False)] if pre.byte_encode else []
    return Sequence([*splits, *as_bytes])


def _byte_level(vocabulary: Vocabulary) -> HfTokenizer:
    pre = vocabulary.pre
    assert pre is not None
    ids = _plain_ids(vocabulary)
    # A token may itself begin with a space, so the space between the two is looked for after the first character.
    merges = [(merge[:cut], merge[cut + 1 :]) for merge in vocabulary.merges if (cut := merge.find(" ", 1)) > 0]
    if len(merges) < len(vocabulary.merges):
        raise ModelFileError("tokenizer.ggml.merges holds an entry that is not two tokens with a space between")
    if names := {vocabulary.tokens[id] for id in vocabulary.reclassified}:
        merges = [m for m in merges if m[0] + m[1] not in names and m[0] not in names and m[1] not in names]
    try:
        model = BPE(ids, merges, ignore_merges=pre.ignore_merges, byte_fallback=not pre.byte_encode)
    except Exception:
        # Looked for only here: it takes longer than building the model.
        missing = next((part for m in merges for part in (*m, "".join(m)) if part not in ids), "")
        raise ModelFileError(f"tokenizer.ggml.merges names {missing[:60]!r}, which is not a token") from None
    tokenizer = HfTokenizer(model)
    tokenizer.pre_tokenizer = word_splitter(pre)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> HfTokenizer:
    """SentencePiece's BPE: of all neighbours that form a token, the best-scored are joined first.

    As merges: every way to cut a token into two tokens, ordered by the score of the whole.
    """
    assert vocabulary.scores is not None
    ids = _plain_ids(vocabulary)
    # User-defined tokens are cut out of the text beforehand, and byte tokens stand for bytes, not their text.
    apart = vocabulary.user_defined | vocabulary.bytes.keys()
    joined = {token: id for token, id in ids.items() if id not in apart}
    scores = vocabulary.scores.tolist()
    merges: list[tuple[float, str, str]] = []
    for token, id in joined.items():
        if len(token) > _LONGEST_TOKEN:
            raise ModelFileError(f"tokenizer.ggml.tokens[{id}] has {len(token)} characters")
        merges += [
            (-scores[id], token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in joined and token[cut:] in joined
        ]
    merges.sort(key=itemgetter(0))
    unknown = None
    if vocabulary.unknown_id is not None:
        unknown = _UNKNOWN
        ids[unknown] = vocabulary.unknown_id
    pairs = [(left, right) for _, left, right in merges]
    return HfTokenizer(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))


def _plain_ids(vocabulary: Vocabulary) -> dict[str, int]:
    ids = vocabulary.ids.copy()
    for id in vocabulary.control:
        del ids[vocabulary.tokens[id]]
    return ids
