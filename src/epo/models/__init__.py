"""Pretrained models by name: which are known, how they are made ready, and what `model.path` stands for."""

from epo.models.catalogue import resolve_model

__all__ = ["resolve_model"]
