"""Prompts made of class names, and a small CLIP tokenizer for them."""

from __future__ import annotations

import json

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

TOKENS = 16  # of a prompt, its beginning and end included
# Where the name of a class is not what one would write.
SPOKEN = {"trouser": "pair of trousers", "ankle-boot": "ankle boot"}
TEMPLATES = (
    "a photo of {a}",
    "{name}",
    "{a}",
    "a picture of {a}",
    "a small photo of {a}",
    "{a} on a plain background",
    "a photo of {a} from a catalogue",
    "an image that shows {a}",
)


def prompts_of(name: str) -> list[str]:
    """A prompt for each template, for the class that the data set calls `name`."""
    spoken = SPOKEN.get(name, name)
    article = "an" if spoken[0] in "aeiou" else "a"
    return [template.format(name=spoken, a=f"{article} {spoken}") for template in TEMPLATES]


def build_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from `texts`.

    All bytes are in the vocabulary, inside and at the end of words, so that any text has tokens.
    """
    ends = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(ByteLevel.alphabet())
    alphabet += [f"{letter}</w>" for letter in alphabet]

    def tokenizer(names: list[str], merges: list[tuple[str, str]]) -> CLIPTokenizer:
        vocabulary = {name: number for number, name in enumerate([*ends, *names])}
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)

    # Without letters at the ends of words that the texts lack: the trainer leaves those out.
    learned = tokenizer(alphabet, []).train_new_from_iterator(texts, vocab_size=1000)
    model = json.loads(learned.backend_tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    merged = dict.fromkeys(left + right for left, right in merges)
    return tokenizer([*alphabet, *(name for name in merged if name not in alphabet)], merges)
