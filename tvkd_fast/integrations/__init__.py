"""Adapters for other trainers. Nothing here is imported, and nothing of theirs changed, until it is asked for."""

from tvkd_fast.integrations.lm_head import FusedLMOutput, patch_lm_head, unpatch_lm_head

__all__ = ["FusedLMOutput", "patch_lm_head", "unpatch_lm_head"]
