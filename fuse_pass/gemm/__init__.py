"""Who multiplies: the problem, the table of providers, what was measured here, packed weights, this machine."""
