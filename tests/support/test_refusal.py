"""A refusal reads as its text and compares as code and text."""

from __future__ import annotations

from stepquant.support.refusal import Refusal, RefusalCode


def test_a_refusal_reads_as_its_text():
    refusal = Refusal(RefusalCode.LORA, "a LoRA")
    assert str(refusal) == f"{refusal}" == "a LoRA"
    assert refusal == Refusal(RefusalCode.LORA, "a LoRA")
    assert len({refusal, Refusal(RefusalCode.LORA, "a LoRA"), Refusal(RefusalCode.HOOK, "")}) == 2


def test_codes_are_distinct_words():
    words = [code.value for code in RefusalCode]
    assert len(set(words)) == len(words)
