"""Everything that touches ComfyUI's insides: tokens, attention hooks, gradients, sampler runs, patches on MODEL."""
