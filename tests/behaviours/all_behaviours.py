"""Every behaviour, in the order of the documentation."""

from __future__ import annotations

import call_behaviours
import lora_behaviours
import memory_behaviours
import pipeline_behaviours
import saving_behaviours
from behaviour import BEHAVIOURS as FOUND

PARTS = (
    saving_behaviours,
    memory_behaviours,
    call_behaviours,
    lora_behaviours,
    pipeline_behaviours,
)
GROUPS = [part.GROUP for part in PARTS]
BEHAVIOURS = dict(sorted(FOUND.items(), key=lambda item: GROUPS.index(item[1].group)))
