"""Everything that touches ComfyUI's internals: tokens, attention hooks, gradients, sampler runs, patches on MODEL."""
