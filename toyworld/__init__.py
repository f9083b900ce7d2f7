"""A small world with exact ground truth: scenes with captions, an exact detector, tiny real-architecture models."""
