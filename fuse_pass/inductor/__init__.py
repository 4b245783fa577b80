"""The only place that names Inductor's private parts, so that a change in PyTorch is met here and nowhere else."""
