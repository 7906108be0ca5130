"""What a run may ask of an objective."""
