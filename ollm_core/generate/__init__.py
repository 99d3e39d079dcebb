"""The transformers face: a causal language model whose `generate` is transformers' own."""
