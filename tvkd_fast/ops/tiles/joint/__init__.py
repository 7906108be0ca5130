"""The joint walk over two vocabularies in tiles, on any device."""
