"""Two models' vocabularies in one walk: divergences, and what else one pass over both heads gives."""
