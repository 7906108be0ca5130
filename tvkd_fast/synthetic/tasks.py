"""The families of questions that the bundled set is drawn from."""

from __future__ import annotations

from tvkd_fast.synthetic.facts import Arithmetic, Capitals, NextNumber, Plural, Sorting, Spelling
from tvkd_fast.synthetic.family import Family
from tvkd_fast.synthetic.forms import Brevity, Casing, FullSentence, JsonFormat, Refusal, YesNo

FAMILIES: tuple[Family, ...] = (
    Arithmetic(),
    Spelling(),
    Capitals(),
    JsonFormat(),
    Brevity(),
    Refusal(),
    Casing(),
    NextNumber(),
    Sorting(),
    Plural(),
    YesNo(),
    FullSentence(),
)
