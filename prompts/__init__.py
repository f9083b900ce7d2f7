"""English: from a prompt to a graph of spatial relations. No torch, no host."""
