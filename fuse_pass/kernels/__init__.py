"""Products with weights of few bits in C++, compiled once per machine, with plain PyTorch as reference and fallback."""
