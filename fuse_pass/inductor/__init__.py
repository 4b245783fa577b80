"""The only place that names PyTorch's private parts, so that a change in PyTorch is met here and nowhere else."""
