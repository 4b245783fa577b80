"""Exact arithmetic on tensors: number formats, rounding, random bits, activations, attention."""
