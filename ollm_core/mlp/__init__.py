"""The MLP of a layer where it is not run with the rest of it: mixtures of experts."""

from ollm_core.mlp.experts import Mixture, RoutedChunk

__all__ = ["Mixture", "RoutedChunk"]
