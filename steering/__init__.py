"""The method, in the order the data walks it: relations, tokens, attention maps, loss, gradient, latent."""
