"""Drawing: canvas, charts, overlays. Plain tensors, no host."""
